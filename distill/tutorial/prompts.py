"""Prompts of the tutorial world, and batches of them."""

from __future__ import annotations

from collections.abc import Collection

from torch import Generator

from ..backbones.base import Backbone
from ..methods.base import Batches
from . import shapes


def speaks(model: Backbone) -> bool:
    """Whether a model knows the words of the tutorial world and no others: it is of this world."""
    return is_vocabulary(getattr(model.tokenizer, "get_vocab", dict)())


def is_vocabulary(words: Collection[str]) -> bool:
    """Whether a tokenizer's words are those of the tutorial world and no others."""
    return {w for w in map(str, words) if not w.startswith("<|")} == set(shapes.vocabulary())


def shape_batches(model: Backbone, batch_size: int) -> Batches:
    """Fresh prompts of the tutorial world, held-out combinations left out: {"cond", "shape"}."""
    shape = model.shape(batch_size)

    def batches(step: int, generator: Generator) -> dict:
        return {"cond": model.encode(shapes.sample_prompts(batch_size, generator)), "shape": shape}

    return batches


def calibration_prompts(model: Backbone, n: int, seed: int) -> list[str] | None:
    """Prompts to calibrate a model of this world on; None for one of another."""
    return shapes.sample_prompts(n, Generator().manual_seed(seed)) if speaks(model) else None
