"""Batches of the tutorial world for `train`."""

from __future__ import annotations

from torch import Generator

from ..backbones.model import Model
from ..training.prompts import Batches
from . import shapes


def shape_batches(model: Model, batch_size: int) -> Batches:
    """Fresh prompts of the tutorial world, held-out combinations left out: {"cond", "shape", "device"}."""
    where = {"shape": model.latent_shape(batch_size), "device": model.device}

    def batches(step: int, generator: Generator) -> dict:
        prompts = shapes.sample_prompts(batch_size, generator)
        return {"cond": model.encode(prompts), **where}

    return batches
