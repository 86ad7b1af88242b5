"""One step of any few-step sampler, whatever the family: predict x0, keep the noise down to a level, add fresh noise.

Families differ in the level they go down to, and in nothing else. Levels are noise levels as k-diffusion and ComfyUI
count them: sigma / alpha of a DDPM schedule (there x is x_t / alpha), sigma of a flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Clock = Callable[[Tensor], Tensor]  # a level -> its timestep, or a timestep -> its level, () -> ()


def euler(now: Tensor, then: Tensor, eta: float, timestep: Clock, level: Clock) -> Tensor:
    """All the way: no fresh noise (DDIM with eta 0; Euler's method)."""
    return then


def renoise(now: Tensor, then: Tensor, eta: float, timestep: Clock, level: Clock) -> Tensor:
    """To the clean latent: all noise is fresh (consistency models, Song et al. 2023, algorithm 1; LCM, DMD2, sCM)."""
    return torch.zeros_like(then)


def ancestral(now: Tensor, then: Tensor, eta: float, timestep: Clock, level: Clock) -> Tensor:
    """As far as the variance of the posterior says (DDPM; k-diffusion's euler_ancestral): then^2 / now."""
    return then**2 / now


def tcd(now: Tensor, then: Tensor, eta: float, timestep: Clock, level: Clock) -> Tensor:
    """To the timestep (1 - eta) of the next (Trajectory Consistency Distillation, Zheng et al. 2024, algorithm 4)."""
    t = math.floor((1 - eta) * float(timestep(then)))
    return level(torch.tensor(float(t), device=then.device)).to(then)


DOWN = {f.__name__: f for f in (euler, renoise, ancestral, tcd)}
"""Where a step from level `now` goes down to before fresh noise takes it up to level `then`"""


def advance(x: Tensor, x0: Tensor, now: Tensor, down: Tensor, then: Tensor, fresh: Tensor, signal: Clock) -> Tensor:
    """x (B, ...) at level `now` and the x0 predicted there -> x at level `then`; fresh: N(0, 1) like x.

    signal: a level -> how much of x0 is in x there: 1 for sigma / alpha, 1 - sigma for a flow.
    """
    eps = (x - signal(now) * x0) / now
    kept = signal(then) / signal(down)
    return kept * (signal(down) * x0 + down * eps) + (then**2 - (kept * down) ** 2).clamp(min=0).sqrt() * fresh
