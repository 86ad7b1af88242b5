"""Where training prompts come from. A source of batches is called as batches(step, generator) by `train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator

from ..backbones.model import Model

Batches = Callable[[int, Generator], dict]


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines are skipped. Raises ValueError for a file without any."""
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it. Write one prompt a line.")
    return prompts


def prompt_batches(model: Model, prompts: list[str], batch_size: int) -> Batches:
    """Batches over a list of prompts, encoded once and kept in memory: {"cond", "shape", "device"}."""
    parts = [model.encode(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
    cache = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    where = {"shape": model.latent_shape(batch_size), "device": model.device}

    def batches(step: int, generator: Generator) -> dict:
        rows = torch.randint(len(prompts), (batch_size,), generator=generator)
        return {"cond": {k: v[rows] for k, v in cache.items()}, **where}

    return batches
