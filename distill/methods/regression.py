"""Regression on teacher pairs: the student learns where the teacher's solver takes each z. No coach.

    x0   = solve(teacher, z, c)                  once, by a fast solver, into a cache
    loss = mean over samples of rms(student(z, c) - x0)

On its own it blurs what the student cannot resolve; as a start for VSD it saves most of the way (DMD2, appendix F;
reference/tutorial-world.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..denoiser import Cond, Denoiser, guided
from ..losses import regression
from ..sample import Student, solve
from ..schedule import randn


@dataclass(frozen=True)
class RegressionOptions:
    guidance: float = 1.5
    """Guidance of the teacher that makes the pairs; best for the tutorial teacher."""
    solver: Literal["dpm++", "ddim"] = "dpm++"
    """dpm++ at 8 steps equals ddim at about 10 in the tutorial world."""
    solver_steps: int = 8
    """Steps per pair: more pairs beat better pairs at a fixed time (8 in the prototypes)."""


class Regression:
    """student: g(z, cond) -> x0. A batch is {"z", "cond", "x0"}, as Pairs gives them."""

    coach_loss = None

    def __init__(self, options: RegressionOptions, student: Student):
        self.options, self.student = options, student

    def student_loss(self, batch: dict, generator: Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.student(batch["z"], batch["cond"]).float()
        loss = regression(x, batch["x0"])
        logs = {"student_loss": loss, "x_mean": x.mean(), "x_std": x.std()}
        return loss, {k: v.detach() for k, v in logs.items()}


@dataclass(frozen=True)
class Pairs:
    """The cache; call it as train.py calls any source of batches."""

    z: Tensor
    cond: Cond
    x0: Tensor
    batch_size: int

    def __len__(self) -> int:
        return len(self.z)

    def __call__(self, step: int, generator: Generator) -> dict:
        rows = torch.randint(len(self), (self.batch_size,), generator=generator, device=generator.device)
        rows = rows.to(self.z.device)
        cond = None if self.cond is None else {k: v[rows] for k, v in self.cond.items()}
        return {"z": self.z[rows], "cond": cond, "x0": self.x0[rows]}


@torch.no_grad()
def build_pairs(
    teacher: Denoiser,
    batches: Callable[[int, Generator], dict],
    options: RegressionOptions,
    generator: Generator,
    *,
    null: Cond = None,
    count: int | None = None,
    seconds: float | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Pairs:
    """Pairs for about `count` samples or `seconds`, whichever ends first; at least one batch.

    batches(step, generator) -> {"cond", "shape"}, as for VSD. progress(pairs so far, seconds so far) after each batch.
    Raises ValueError when there is no budget at all.
    """
    if count is None and seconds is None:
        raise ValueError("build_pairs needs a budget: count or seconds")
    denoiser, rows, start = guided(teacher, options.guidance, null), [], time.monotonic()
    n = 0
    while not rows or ((count is None or n < count) and (seconds is None or time.monotonic() - start < seconds)):
        batch = batches(len(rows), generator)
        z = randn(batch["shape"], generator, batch.get("device"))
        x0 = solve(denoiser, z, batch["cond"], solver=options.solver, steps=options.solver_steps)
        rows.append((z, batch["cond"], x0))
        n += len(z)
        if progress is not None:
            progress(n, time.monotonic() - start)
    z, conds, x0 = zip(*rows)
    cond = None if conds[0] is None else {k: torch.cat([c[k] for c in conds]) for k in conds[0]}
    return Pairs(torch.cat(z), cond, torch.cat(x0), len(z[0]))
