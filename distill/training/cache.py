"""Rows that are dear to make, such as embeddings of prompts and latents of pictures: made once, and kept in shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from .. import shards
from ..backbones.base import Backbone
from ..denoiser import Cond
from ..methods.base import Told
from ..shards import Rows, as_bytes, leaves
from .processes import part_at_exit

Make = Callable[[range], Cond]
"""Numbers of rows -> these rows, batch first: tensors in dicts, lists and tuples."""


def in_memory(make: Make, count: int) -> Rows:
    """All rows, made now and held where `make` puts them."""
    held = [leaves(make(part)) for part in _parts(count)]
    return Rows(make(range(1)), count, held.__getitem__, shards.ROWS)


def on_disk(
    folder: Path, key: str, make: Make, count: int, dtype: torch.dtype | None = None, told: Told | None = None
) -> Rows:
    """Rows in folder/key: those that are there and sound, the others made now.

    key: of all that the rows depend on (`shards.hashed`). dtype: how floating point numbers are stored, by default as
    they are made. told(what, share) after each shard. Several processes (torchrun) make them together.
    """
    like, folder = make(range(1)), folder / key
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parts = _parts(count)
    for i in range(rank, len(parts), world):
        path = shards.place(folder, i)
        if shards.sound(path, len(parts[i])) is None:
            shards.write(path, leaves(make(parts[i])), dtype)
        if told is not None:
            told("embeddings", (i + 1) / len(parts))
    if world > 1:
        from accelerate import PartialState

        PartialState(cpu=leaves(like)[0].device.type == "cpu").wait_for_everyone()
        part_at_exit()
    return Rows(like, count, shards.mapped(folder), shards.ROWS)


def _parts(count: int) -> list[range]:
    return [range(i, min(i + shards.ROWS, count)) for i in range(0, count, shards.ROWS)]


def identity(model: Backbone, parts: Iterable[str]) -> list:
    """What tells some parts of a model, such as its text encoders, from others: classes, weights, tokenizer and sizes.

    Of each tensor 64 values are taken: another training changes all of them, and 10 GB need not be read.
    """

    def sample(v: Tensor) -> bytes:
        flat = v.detach().flatten()
        return bytes(as_bytes(flat[:: max(1, len(flat) // 64)][:64].cpu()))

    found: list = [str(model.meta.text_encoder), list(model.shape(1))]
    for name in sorted(parts):
        module = model.parts[name]
        tensors = [[key, list(v.shape), str(v.dtype), sample(v)] for key, v in module.state_dict().items()]
        found.append([name, type(module).__name__, tensors])
    return found
