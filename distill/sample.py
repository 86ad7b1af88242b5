"""Samplers: one step, few steps, and solvers for the teacher. Plain functions of a Denoiser.

The solvers are the textbook ones in x0 and sigma/alpha, a few lines each and equal to diffusers' own (test_sample.py
holds them to it); `through_diffusers` runs any diffusers scheduler on the same teacher instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from .checks import need
from .denoiser import Cond, Denoiser
from .schedule import expand, randn

Generate = Callable[[Tensor, Cond], Tensor]  # g(z, cond) -> x0


def one_step(denoiser: Denoiser, t_in: float = 1.0) -> Generate:
    """The student g(z, cond) -> x0: the denoiser called once at t_in (schedule.time(999) for a native index).

    z ~ N(0, 1) stands in for x_t. It is scaled to the spread sqrt(alpha^2 + sigma^2) that a noised unit-variance
    latent has: 1 for SD and flow at t = 1, as SwiftBrush (999) and DMD2 (399) call theirs; about sigma for EDM.
    """

    def student(z: Tensor, cond: Cond = None) -> Tensor:
        t = torch.full((len(z),), t_in, device=z.device)
        return denoiser(prior_scale(denoiser, t, z) * z, t, cond)

    return student


def few_step(denoiser: Denoiser, times: list[float]) -> Callable:
    """g(z, cond, generator) -> x0: predict x0, noise it again to the next of `times`, and so on (consistency models,
    Song et al. 2023, algorithm 1; DMD2). times falls, all in (0, 1]; one entry is one_step."""

    def student(z: Tensor, cond: Cond = None, generator: Generator | None = None) -> Tensor:
        x0 = one_step(denoiser, times[0])(z, cond)
        for t in times[1:]:
            x0 = renoised(denoiser, x0, t, cond, generator)
        return x0

    return student


def renoised(denoiser: Denoiser, x0: Tensor, t: float, cond: Cond, generator: Generator | None) -> Tensor:
    """x0 (B, ...) noised to t and predicted again."""
    t = torch.full((len(x0),), t, device=x0.device)
    return denoiser(denoiser.schedule.noise(x0, t, randn(x0.shape, generator, x0.device)), t, cond)


def prior_scale(denoiser: Denoiser, t: Tensor, x: Tensor) -> Tensor:
    """sqrt(alpha^2 + sigma^2) at t, ready to multiply x: the spread of a noised unit-variance latent."""
    return expand((denoiser.schedule.alpha(t) ** 2 + denoiser.schedule.sigma(t) ** 2).sqrt(), x)


# ------------------------------------------------------------------------------------------------- the solvers


def ddim_step(x: Tensor, x0: Tensor, now: tuple, then: tuple, before: tuple | None) -> Tensor:
    """Keep the noise, lower its level (DDIM, Song et al. 2020, eq. 12, eta 0). On a flow schedule this is Euler."""
    (alpha, sigma), (alpha_, sigma_) = now, then
    return alpha_ * x0 + sigma_ / sigma * (x - alpha * x0)


def dpm_step(x: Tensor, x0: Tensor, now: tuple, then: tuple, before: tuple | None) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): extrapolate x0 along log SNR from the step before."""
    (_, sigma), (alpha_, sigma_) = now, then
    h = half_log_snr(then) - half_log_snr(now)
    if before is not None:
        level_before, x0_before = before
        r = (half_log_snr(now) - half_log_snr(level_before)) / h
        x0 = x0 + (x0 - x0_before) / (2 * r)
    return sigma_ / sigma * x - alpha_ * torch.expm1(-h) * x0


def half_log_snr(level: tuple) -> Tensor:
    """log(alpha / sigma) of a level."""
    return level[0].log() - level[1].log()


SOLVERS = {"ddim": ddim_step, "dpm++": dpm_step}


def trailing(steps: int) -> list[float]:
    """1, 1 - 1/n, ..., 1/n: starts at the noisiest t (Lin et al. 2023, table 2)."""
    return [1 - i / steps for i in range(steps)]


@torch.no_grad()
def solve(
    denoiser: Denoiser,
    z: Tensor,
    cond: Cond = None,
    *,
    solver: str = "dpm++",
    steps: int = 8,
    times: list[float] | None = None,
    callback: Callable[[int, Tensor], Any] | None = None,
) -> Tensor:
    """z ~ N(0, 1) (B, ...) -> x0, by `steps` calls of the denoiser at `times` (default: trailing(steps)).

    The last step is plain: it returns the x0 predicted there. callback(i, x0) sees every prediction.
    """
    times = trailing(steps) if times is None else times
    x = prior_scale(denoiser, torch.full((len(z),), times[0], device=z.device), z) * z
    return solve_from(denoiser, x, times, cond, solver=solver, callback=callback)


@torch.no_grad()
def solve_from(
    denoiser: Denoiser,
    x: Tensor,
    times: list[float],
    cond: Cond = None,
    *,
    solver: str = "dpm++",
    callback: Callable[[int, Tensor], Any] | None = None,
) -> Tensor:
    """x_t (B, ...) of times[0] -> x0, as `solve` goes on from it."""
    need(solver in SOLVERS, "solver", solver, f"one of {', '.join(SOLVERS)}")
    step, schedule, before = SOLVERS[solver], denoiser.schedule, None
    ts = [torch.full((len(x),), t, device=x.device) for t in times]
    levels = [(expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)) for t in ts]
    for i, t in enumerate(ts):
        x0 = denoiser(x, t, cond)
        if callback is not None:
            callback(i, x0)
        if i + 1 < len(ts):
            x = step(x, x0, levels[i], levels[i + 1], before)
            before = levels[i], x0
    return x0


# ------------------------------------------------------------------------------------- diffusers' own schedulers


def diffusers_scheduler(denoiser: Denoiser, name: str = "ddim") -> Any:
    """A diffusers scheduler with this denoiser's schedule: "ddim", "dpm++", "euler" (ddpm kind), "flow" (flow kind)."""
    import diffusers

    spec = denoiser.schedule.spec
    if name == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(spec["num_train_timesteps"], shift=spec["shift"])
    t = torch.arange(spec["num_train_timesteps"], dtype=torch.float64)
    abar = denoiser.schedule.alpha(denoiser.schedule.time(t)) ** 2
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    common = {"trained_betas": betas.numpy(), "prediction_type": "sample", "timestep_spacing": "trailing"}
    if name == "ddim":
        return diffusers.DDIMScheduler(**common, clip_sample=False)
    if name == "dpm++":
        return diffusers.DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++")
    if name == "euler":
        return diffusers.EulerDiscreteScheduler(**common)
    raise ValueError(f"scheduler {name!r} is not one of ddim, dpm++, euler, flow")


@torch.no_grad()
def through_diffusers(denoiser: Denoiser, scheduler: Any, z: Tensor, cond: Cond = None, *, steps: int = 50) -> Tensor:
    """z -> x0 through a diffusers scheduler from `diffusers_scheduler` (or one of yours with the same noise levels)."""
    scheduler.set_timesteps(steps)
    x = z * getattr(scheduler, "init_noise_sigma", 1.0)
    for index in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, index) if hasattr(scheduler, "scale_model_input") else x
        t = torch.full((len(z),), float(denoiser.schedule.time(float(index))), device=z.device)
        out = denoiser(scaled, t, cond)
        if denoiser.schedule.name == "flow":  # its scheduler wants the velocity
            out = (x - out) / expand(denoiser.schedule.sigma(t), x)
        x = scheduler.step(out, index, x, return_dict=False)[0]
    return x
