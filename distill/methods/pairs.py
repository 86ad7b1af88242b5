"""Pairs (z, x0) of a teacher's solver, in memory or on disk: data for regression and whatever else learns its map."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from .. import shards
from ..denoiser import Denoiser, map_cond
from ..sample import solve
from ..schedule import randn
from ..shards import Rows, leaves
from .base import Batches, Told


@dataclass(frozen=True)
class Pairs:
    """Rows of {"z", "cond", "x0"}; call it as the loop calls any source of batches."""

    rows: Rows
    batch_size: int

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, step: int, generator: Generator) -> dict:
        return self.rows[torch.randint(len(self), (self.batch_size,), generator=generator, device=generator.device)]


@torch.no_grad()
def build_pairs(
    teacher: Denoiser,
    batches: Batches,
    generator: Generator,
    *,
    solver: str = "dpm++",
    steps: int = 8,
    count: int | None = None,
    seconds: float | None = None,
    folder: Path | None = None,
    about: Any = None,
    told: Told | None = None,
) -> Pairs:
    """Pairs for about `count` samples or `seconds`, whichever ends first; at least one batch. The teacher comes guided.

    batches(step, generator) -> {"cond", "shape"}, and "device" where that is not the CPU. folder: for shards; those
    that are there, sound, and of these prompts, solver, budget and `about` (what else they depend on, such as the
    guidance) are found again, the others are made as they would have been. None: in memory. told("teacher pairs",
    share) after each batch that is made. Raises ValueError when there is no budget at all.
    """
    if count is None and seconds is None:
        raise ValueError("build_pairs needs a budget: count or seconds")
    state = generator.get_state()
    first = batches(0, Generator(generator.device).set_state(state))
    size, z = first["shape"][0], torch.empty(tuple(first["shape"]))
    like = map_cond(lambda v: v[:1], {"z": z, "cond": first["cond"], "x0": z})
    if folder is not None:
        drawn = [bytes(shards.as_bytes(v.cpu())) for v in (state, *leaves(first["cond"]))]
        folder = folder / shards.hashed(solver, steps, count, seconds, about, drawn)
        folder.mkdir(parents=True, exist_ok=True)
    each = max(1, shards.ROWS // size)  # batches a shard
    held: list[list[Tensor]] = []
    n, spent, done = 0, 0.0, 0.0
    while done < 1:
        path = folder and shards.place(folder, len(held))
        if path is not None and (notes := shards.sound(path)) is not None:
            n, spent, done, state = json.loads(notes)
            generator.set_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))
            held.append([])
            continue
        start, made = time.monotonic() - spent, []
        while not made or (len(made) < each and done < 1):
            batch = batches(len(held) * each + len(made), generator)
            z = randn(batch["shape"], generator, batch.get("device"))
            x0 = solve(teacher, z, batch["cond"], solver=solver, steps=steps)
            made.append({"z": z, "cond": batch["cond"], "x0": x0})
            n, spent = n + len(z), time.monotonic() - start
            done = n / count if count is not None else 0.0
            if seconds is not None:
                done = max(done, spent / max(seconds, 1e-9))
            if told is not None:
                told("teacher pairs", min(1.0, done))
        tensors = leaves(map_cond(lambda *parts: torch.cat(parts), *made))
        if path is not None:
            state = bytes(shards.as_bytes(generator.get_state())).hex()
            shards.write(path, tensors, notes=json.dumps([n, spent, done, state]))
            tensors = []
        held.append(tensors)
    found = held.__getitem__ if folder is None else shards.mapped(folder)
    return Pairs(Rows(like, n, found, each * size), size)
