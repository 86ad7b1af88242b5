"""Variational score distillation with a coach: SwiftBrush (2312.05239), DMD's matching term (2311.18828), NASA.

    x    = student(z, c)                                  z ~ N(0, I)
    x_t  = alpha x + sigma eps                            t ~ U(t_min, t_max)
    g    = w(t) (x0_C(x_t, t, c) - x0_T(x_t, t, c))       no gradient through teacher T and coach C; T guided
    student:  minimise <x, g>                             i.e. step its parameters along -g dx/dtheta
    coach:    minimise w_C(t) |x0_C(x_t, t, c) - x|^2     on fresh, detached x; some c dropped to the null prompt

The gradient of KL(student || teacher) at every noise level. At the start the coach is the teacher and g = 0: the
student moves only because the coach learns. Keep the coach at least 4 times as fast as the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..coach import Coach
from ..denoiser import Cond, Denoiser, autoguided, drop, guided, with_plain
from ..losses import COACH_WEIGHTS, WEIGHTS, denoising, health, matching_gradient, surrogate
from ..sample import Student
from ..schedule import Times, expand, rand, randn, uniform


@dataclass(frozen=True)
class VSDOptions:
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


class VSD:
    """student: g(z, cond) -> x0. null: the null prompt's cond, one row; None where nothing is guided or dropped.
    weak: a worse teacher, such as an early checkpoint of it, for options.autoguidance.

    A batch is {"cond": Cond, "shape": (B, C, H, W), "device": where}, the device optional. times, if given, replaces
    the uniform draw of t for the student's step.
    """

    def __init__(
        self,
        options: VSDOptions,
        student: Student,
        coach: Coach,
        null: Cond = None,
        times: Times | None = None,
        weak: Denoiser | None = None,
    ):
        self.options, self.student, self.coach, self.null, self.weak = options, student, coach, null, weak
        self.schedule = coach.teacher.schedule
        self.times = times or uniform(options.t_min, options.t_max)
        self.coach_times = uniform(0.001, 0.999)  # all of it, as the coach has to be a denoiser (range of FastGen)

    def student_loss(self, batch: dict, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        cond = batch["cond"]
        x = self.generate(batch, generator)
        batch["x"] = x.detach()
        with torch.no_grad():
            x_t, t = self.renoise(x, self.times, generator)
            w = self.draw_guidance(x, t, generator)
            teacher = autoguided(guided(self.coach.teacher, w, self.null), self.options.autoguidance, self.weak)
            x0_T, plain_T = with_plain(teacher, x_t, t, cond)
            x0_C, plain_C = self.coach_says(x, x_t, t, cond, w)
            alpha, sigma = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)
            g = matching_gradient(x0_T, x0_C, WEIGHTS[self.options.weight](x, x0_T, alpha, sigma))
        loss = surrogate(x, g)
        logs = {"student_loss": loss, "coach_ratio": (plain_C - x).square().mean() / (plain_T - x).square().mean()}
        return loss, {k: v.detach() for k, v in logs.items()} | health(x, x0_T, x0_C)

    def coach_says(self, x: Tensor, x_t: Tensor, t: Tensor, cond: Cond, w: float | Tensor) -> tuple[Tensor, Tensor]:
        """The coach's x0, and its x0 without guidance."""
        guide = {"teacher": self.coach.denoiser, "both": guided(self.coach.denoiser, w, self.null)}
        return with_plain(guide[self.options.guide], x_t, t, cond)

    def coach_loss(self, batch: dict, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
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
        """Student samples, in fp32."""
        return self.student(randn(batch["shape"], generator, batch.get("device")), batch["cond"]).float()

    def renoise(self, x: Tensor, times: Times, generator: Generator) -> tuple[Tensor, Tensor]:
        t = times(len(x), generator, x.device)
        return self.schedule.noise(x.detach(), t, randn(x.shape, generator, x.device)), t

    def draw_guidance(self, x: Tensor, t: Tensor, generator: Generator) -> float | Tensor:
        o = self.options
        w = o.guidance
        if o.guidance_max is not None:
            w = w + (o.guidance_max - w) * rand((len(x),), generator, x.device)
        return w if o.guidance_until >= 1 else torch.where(t <= o.guidance_until, w, 1.0)
