"""Variational score distillation with a coach: SwiftBrush (2312.05239), DMD's matching term (2311.18828), NASA.

    x    = student(z, c)                                  z ~ N(0, I)
    x_t  = alpha x + sigma eps                            t ~ U(t_min, t_max)
    g    = w(t) (x0_C(x_t, t, c) - x0_T(x_t, t, c))       no gradient through teacher T and coach C; T guided
    student:  minimise <x, g>                             i.e. step its parameters along -g dx/dtheta
    coach:    minimise w_C(t) |x0_C(x_t, t, c) - x|^2     on fresh, detached x; some c dropped to the null prompt

The gradient of KL(student || teacher) at every noise level. At the start the coach is the teacher and g = 0: the
student moves only because the coach learns. Keep the coach at least 4 times as fast as the student.

A student of more calls learns the later ones by regression, on what it drew itself (backward simulation, DMD2 4.5):

    x_t  = alpha x + sigma eps                            x of the call before, t the call's
    minimise |student(x_t, t, c) - solver(x_t, c)|^2      where the guided teacher's solver goes from x_t
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Literal

import torch
from torch import Generator, Tensor

from ..checks import need, positive, within
from ..coach import Coach, CopyCoach, LoraCoach
from ..denoiser import Cond, Denoiser, autoguided, drop, guided, with_plain
from ..losses import COACH_WEIGHTS, WEIGHTS, denoising, health, matching_gradient, surrogate
from ..sample import Generate, solve_from
from ..schedule import Times, expand, rand, randn, uniform
from .base import Method, Net, Parts, Phase


@dataclass(frozen=True)
class VSDOptions:
    """Options of score distillation with a coach."""

    weight: Literal["dmd", "tdm", "swiftbrush", "prolificdreamer", "diff_instruct", "one"] = "swiftbrush"
    """Weight w of the student's gradient, losses.WEIGHTS. swiftbrush against dmd in the tutorial world, 250 steps after
    regression, guidance 1.5: Frechet distance 73 against 113, n = 256."""
    guidance: float = 1.5
    """Guidance of the teacher. 1.5: the tutorial teacher's; SwiftBrush 4.5, DMD2 1.75 (SD 1.5) and 8 (SDXL)."""
    guidance_max: float | None = None
    """If set, guidance is drawn per sample from U(guidance, guidance_max): NASA's stabiliser, U(0.5, 4)."""
    guidance_until: float = 1.0
    """Guide only up to this t (Kynkaanniemi et al. 2024): in the heaviest noise guidance mostly saturates colours.
    Tutorial world, n = 256: guidance 2 up to t = .45 gives Frechet 61, 1.5 everywhere 73; accuracy .98 and .97."""
    autoguidance: float = 1.0
    """Guidance of the teacher away from a weaker one, at every t (Karras et al. 2024, 2406.02507; 1: off). Needs that
    one. Its law is wider and nearer to the data, not sharper."""
    guide: Literal["teacher", "both"] = "teacher"
    """teacher (DMD2): the student bakes the sharpened law in. both (SwiftBrush): its fixed point is the plain one."""
    t_min: float = 0.02
    """SwiftBrush and DMD2 draw t from 2 to 98 %: near 0 the gradient is noise and NaN, at 1 it carries nothing."""
    t_max: float = 0.98
    """See t_min."""
    coach_weight: Literal["one", "eps", "swiftbrush", "edm", "clamped"] = "clamped"
    """Weight of the coach's loss, losses.COACH_WEIGHTS. clamped: what the tutorial teacher itself was trained with."""
    null_drop: float = 0.1
    """Share of the coach's samples that get the null prompt (SwiftBrush .1). Needed when the coach is guided."""
    coach_batch: Literal["fresh", "shared"] = "shared"
    """shared: the coach's first step reuses the student's samples of that step (SwiftBrush, DMD2): a forward less."""
    coach: Literal["lora", "copy"] = "lora"
    """lora: adapters over the teacher's weights, least memory (SwiftBrush). copy: a second net, better and faster."""
    rank: int = 64
    """Of the LoRA coach (SwiftBrush 64)."""
    alpha: float | None = None
    """Its scale is alpha / rank. Default: twice the rank (SwiftBrush v2, NASA: rank 64, alpha 128)."""
    targets: tuple[str, ...] | None = None
    """Layers that it adapts, by name or ending. Default: the family's. SwiftBrush: to_q to_v; in the tutorial world a
    coach on attention alone could not follow the student (its loss rose sevenfold)."""
    coach_steps: int = 1
    """Coach steps per student step (SwiftBrush 1, DMD2 5): the smallest at which x_mean and x_std hold still."""
    coach_warmup: int = 0
    """Iterations of the coach alone at the start; without them the first student steps have no direction."""
    lr: float = 2e-4
    """Learning rate of the student. Tutorial world: 2e-4 after regression, 5e-4 from the teacher; SD eps-nets: 1e-6."""
    coach_lr: float | None = None
    """Of the coach. Default: 2e-3 for lora, 1e-3 for copy (tutorial world; SwiftBrush LoRA 1e-3). It has to outrun the
    student 4 times."""

    def __post_init__(self) -> None:
        check_times(self)
        within(self, null_drop=(0, 1), rank=(1, 2**14), coach_steps=(1, inf), coach_warmup=(0, inf))
        positive(self, "lr", "coach_lr", "alpha")

    def build(self, parts: Parts) -> VSD:
        """The method; its coach has the teacher's weights with adapters, or a copy of them."""
        if self.coach == "lora":
            how = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets or parts.targets}
            coach = LoraCoach(parts.net, parts.make, **how, generator=parts.generator)
        else:
            coach = CopyCoach(parts.net, parts.make)
        return VSD(self, parts.student, coach, parts.null, weak=parts.weak)


def check_times(options: VSDOptions) -> None:
    """Raise ValueError where t_min, t_max or a guidance cannot be. Also for methods with the same fields."""
    o = options
    need(0 <= o.t_min < o.t_max <= 1, "t_min, t_max", (o.t_min, o.t_max), "0 <= t_min < t_max <= 1")
    anything = (-inf, inf)
    within(o, guidance=anything, guidance_max=anything, autoguidance=anything, guidance_until=(0, 1))


class VSD(Method):
    """student: g(z, cond) -> x0. null: the null prompt's cond, one row; None where nothing is guided or dropped.
    weak: a worse teacher, such as an early checkpoint of it, for options.autoguidance.

    A batch is {"cond": Cond, "shape": (B, C, H, W), "device": where}, the device optional. times, if given, replaces
    the uniform draw of t for the student's step.
    """

    def __init__(
        self,
        options: VSDOptions,
        student: Generate,
        coach: Coach,
        null: Cond = None,
        times: Times | None = None,
        weak: Denoiser | None = None,
    ):
        self.options, self.student, self.coach, self.null, self.weak = options, student, coach, null, weak
        if options.autoguidance != 1 and weak is None:
            raise ValueError(f"autoguidance {options.autoguidance} needs a weaker teacher; pass one, or 1 for none")
        self.teacher = coach.teacher
        self.schedule = self.teacher.schedule
        self.times = times or uniform(options.t_min, options.t_max)
        self.coach_times = uniform(0.001, 0.999)  # all of it, as the coach has to be a denoiser (range of FastGen)

    @property
    def nets(self) -> dict[str, Net]:
        o = self.options
        coach_lr = {"lora": 2e-3, "copy": 1e-3}[o.coach] if o.coach_lr is None else o.coach_lr
        return {"student": Net(self.student, o.lr, average=True), "coach": Net(self.coach, coach_lr)}

    def phases(self, step: int) -> Iterator[Phase]:
        if step >= self.options.coach_warmup:
            yield from self.student_phases()
        for i in range(self.options.coach_steps):
            yield Phase("coach", self.coach_loss, fresh=i > 0)

    def student_phases(self) -> Iterator[Phase]:
        """One for each of the student's calls, in order, on one batch."""
        yield Phase("student", self.student_loss)
        for i in range(1, len(getattr(self.student, "times", [1.0]))):
            yield Phase("student", partial(self.later_loss, i), fresh=False)

    def student_loss(self, batch: dict, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(a scalar whose gradient is g, readouts); leaves the samples in batch["x"] and batch["before"]."""
        cond = batch["cond"]
        x = self.generate(batch, generator)
        batch["x"] = batch["before"] = x.detach()
        with torch.no_grad():
            x_t, t = self.renoise(x, self.times, generator)
            w = self.draw_guidance(x, generator)
            x0_T, plain_T = with_plain(self.law(w), x_t, t, cond)
            x0_C, plain_C = self.coach_says(x, x_t, t, cond, w)
            alpha, sigma = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)
            g = matching_gradient(x0_T, x0_C, WEIGHTS[self.options.weight](x, x0_T, alpha, sigma))
        loss = surrogate(x, g)
        logs = {"student_loss": loss, "coach_ratio": (plain_C - x).square().mean() / (plain_T - x).square().mean()}
        return loss, {k: v.detach() for k, v in logs.items()} | health(x, x0_T, x0_C)

    def coach_says(self, x: Tensor, x_t: Tensor, t: Tensor, cond: Cond, w: float | Tensor) -> tuple[Tensor, Tensor]:
        """The coach's x0, and its x0 without guidance."""
        coach = self.coach.denoiser
        if self.options.guide == "both":
            coach = guided(coach, w, self.null, self.options.guidance_until)
        return with_plain(coach, x_t, t, cond)

    def law(self, w: float | Tensor) -> Denoiser:
        """What the student is drawn to: the teacher as it is guided."""
        o = self.options
        return autoguided(guided(self.teacher, w, self.null, o.guidance_until), o.autoguidance, self.weak)

    def later_loss(self, i: int, batch: dict, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(the mean squared error of call i, from 1, readouts); takes batch["before"] and leaves its own samples there.

        The solver halves t twice on its way. Regression blurs only what x_t leaves open, which is little at a low t.
        """
        cond, t = batch["cond"], self.student.times[i]
        with torch.no_grad():
            x_t, times = self.renoise(
                batch["before"], lambda n, g, device: torch.full((n,), t, device=device), generator
            )
            w = self.draw_guidance(x_t, generator)
            target = solve_from(self.law(w), x_t, [t, t / 2, t / 4], cond)
        x = self.student.denoiser(x_t, times, cond).float()
        batch["before"] = x.detach()
        loss = (x - target).square().mean()
        return loss, {f"call_{i + 1}_loss": loss.detach()}

    def coach_loss(self, batch: dict, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(the denoising loss on the student's samples, readouts)."""
        if self.options.coach_batch == "shared" and "x" in batch:
            x = batch["x"]
        else:
            with torch.no_grad():
                x = self.generate(batch, generator)
        x_t, t = self.renoise(x, self.coach_times, generator)
        keep = rand((len(x),), generator, x.device) >= self.options.null_drop
        x0_hat = self.coach.denoiser(x_t, t, drop(batch["cond"], self.null, keep))
        alpha, sigma = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)
        loss = denoising(x0_hat, x, COACH_WEIGHTS[self.options.coach_weight](alpha, sigma))
        return loss, {"coach_loss": loss.detach()}

    def generate(self, batch: dict, generator: Generator) -> Tensor:
        """The student's samples of one call, in fp32."""
        return self.student(randn(batch["shape"], generator, batch.get("device")), batch["cond"]).float()

    def renoise(self, x: Tensor, times: Times, generator: Generator) -> tuple[Tensor, Tensor]:
        """x (B, ...) noised at t ~ times -> (x_t, t)."""
        t = times(len(x), generator, x.device)
        return self.schedule.noise(x.detach(), t, randn(x.shape, generator, x.device)), t

    def draw_guidance(self, x: Tensor, generator: Generator) -> float | Tensor:
        """w: a number, or (B,) where it differs from sample to sample."""
        w, largest = self.options.guidance, self.options.guidance_max
        return w if largest is None else w + (largest - w) * rand((len(x),), generator, x.device)
