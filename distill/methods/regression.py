"""Regression on teacher pairs: the student learns where the teacher's solver takes each z. No coach.

    x0   = solve(teacher, z, c)                  once, by a fast solver, into a cache
    loss = mean over samples of rms(student(z, c) - x0)

On its own it blurs what the student cannot resolve; as a start for VSD it saves most of the way (DMD2, appendix F).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

from torch import Generator, Tensor

from ..checks import need, positive, within
from ..denoiser import Denoiser, autoguided, guided
from ..losses import regression
from ..sample import Generate
from .base import Batches, Method, Net, Parts, Phase, Told
from .pairs import build_pairs


@dataclass(frozen=True)
class RegressionOptions:
    """Options of regression on teacher pairs."""

    guidance: float = 1.5
    """Guidance of the teacher that makes the pairs; best for the tutorial teacher."""
    guidance_until: float = 1.0
    """Guide only at t up to this; as VSD's."""
    autoguidance: float = 1.0
    """Guidance away from a weaker teacher; as VSD's."""
    solver: Literal["dpm++", "ddim"] = "dpm++"
    """dpm++ at 8 steps equals ddim at about 10 in the tutorial world."""
    solver_steps: int = 8
    """Steps per pair: more pairs beat better pairs at a fixed time."""
    pairs: int | None = 4096
    """Teacher pairs to make; they are kept in the run's folder. None: as many as `pairs_minutes` allow."""
    pairs_minutes: float | None = None
    """Time for making them."""
    lr: float = 1e-3
    """Learning rate of the student (tutorial world)."""

    def __post_init__(self) -> None:
        within(
            self,
            guidance=(-inf, inf),
            guidance_until=(0, 1),
            autoguidance=(-inf, inf),
            solver_steps=(1, inf),
            pairs=(1, inf),
        )
        need(self.pairs is not None or self.pairs_minutes is not None, "pairs", None, "give pairs or pairs_minutes")
        positive(self, "lr", "pairs_minutes")

    def build(self, parts: Parts) -> Regression:
        """The method, with the guided teacher that makes its pairs. Raises ValueError for a student of more steps."""
        calls = len(parts.student.times)
        need(calls == 1, "calls", calls, "1: pairs teach one call; give what this makes to vsd as --init")
        teacher = guided(parts.make(parts.net.requires_grad_(False)), self.guidance, parts.null, self.guidance_until)
        return Regression(self, parts.student, autoguided(teacher, self.autoguidance, parts.weak))


class Regression(Method):
    """student: g(z, cond) -> x0; teacher, already guided: what makes the pairs. A batch is {"z", "cond", "x0"}."""

    def __init__(self, options: RegressionOptions, student: Generate, teacher: Denoiser | None = None):
        self.options, self.student, self.teacher = options, student, teacher

    @property
    def nets(self) -> dict[str, Net]:
        return {"student": Net(self.student, self.options.lr, average=True)}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", self.student_loss)

    def data(self, batches: Batches, generator: Generator, folder: Path | None, told: Told) -> Batches:
        """The teacher's pairs, in shards in folder/pairs."""
        o = self.options
        about = [o.guidance, o.guidance_until, o.autoguidance]
        return build_pairs(
            self.teacher, batches, generator, solver=o.solver, steps=o.solver_steps, count=o.pairs,
            seconds=None if o.pairs_minutes is None else 60 * o.pairs_minutes,
            folder=None if folder is None else folder / "pairs", about=about, told=told,
        )  # fmt: skip

    def student_loss(self, batch: dict, generator: Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss, readouts) of a batch of pairs."""
        x = self.student(batch["z"], batch["cond"]).float()
        loss = regression(x, batch["x0"])
        logs = {"student_loss": loss, "x_mean": x.mean(), "x_std": x.std()}
        return loss, {k: v.detach() for k, v in logs.items()}
