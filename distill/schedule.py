"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps for t in [0, 1]; 0 is clean, 1 the noisiest the net knows.

A schedule is five numbers' worth of functions and the JSON that makes it again. Everything else (losses, methods,
samplers) is written in alpha, sigma and x0, so that a new schedule is one function here and nothing elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor

Device = str | torch.device | None
Times = Callable[..., Tensor]  # (n, generator, device) -> t of shape (n,)


@dataclass(frozen=True)
class Schedule:
    """alpha, sigma and index take and give tensors of any shape (usually (B,)); time also takes a plain number."""

    name: str
    alpha: Callable[[Tensor], Tensor]
    """Signal level at t."""
    sigma: Callable[[Tensor], Tensor]
    """Noise level at t."""
    index: Callable[[Tensor], Tensor]
    """What the net is told instead of t: 0..999, 0..1000, radians or ln(sigma)/4."""
    time: Callable
    """The inverse of index."""
    spec: dict
    """JSON; from_spec(spec) is this schedule again."""

    def noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps; t is (B,), the others (B, ...)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)) ** 2


def expand(v: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) with the rank of x, to multiply x sample by sample."""
    return v.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


# ---------------------------------------------------------------------------------------------- the schedules


def ddpm(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = 1000,
    shift: float = 1.0,
    beta_schedule: str = "scaled_linear",
) -> Schedule:
    """Diffusers' schedules by betas, "scaled_linear" or "linear"; alpha^2 + sigma^2 = 1. Defaults: SD 1.x, 2.x and XL.

    The net knows whole indices only, so t snaps to the nearest one and alpha, sigma come from the table.
    shift multiplies sigma/alpha (Hoogeboom et al. 2023, simple diffusion, eq. 5): small images need more noise.
    """
    if beta_schedule not in POWERS:
        raise ValueError(f"beta_schedule {beta_schedule!r} is not one of {', '.join(POWERS)}")
    args = (beta_start, beta_end, num_train_timesteps, shift, POWERS[beta_schedule])
    last = num_train_timesteps - 1

    def index(t: Tensor) -> Tensor:
        return (t * last).round()

    def lookup(row: int) -> Callable[[Tensor], Tensor]:
        return lambda t: _ddpm_table(*args, t.device)[row][index(t).long()].to(t.dtype)

    spec = {"kind": "ddpm", "beta_start": beta_start, "beta_end": beta_end, "beta_schedule": beta_schedule}
    spec |= {"num_train_timesteps": num_train_timesteps, "shift": shift}
    return Schedule("ddpm", lookup(0), lookup(1), index, lambda i: i / last, spec)


POWERS = {"scaled_linear": 2.0, "linear": 1.0}  # betas are even in their 1/power


@lru_cache(maxsize=16)
def _ddpm_table(
    beta_start: float, beta_end: float, num: int, shift: float, power: float, device: torch.device
) -> Tensor:
    betas = torch.linspace(beta_start ** (1 / power), beta_end ** (1 / power), num, dtype=torch.float64) ** power
    abar = (1 - betas).cumprod(0)
    s = shift * ((1 - abar) / abar).sqrt()  # sigma / alpha
    table = torch.stack([1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()])  # (2, num): alpha, sigma
    return table.to(device, torch.float32 if device.type == "mps" else torch.float64)  # Apple's GPUs have no doubles


def flow(shift: float = 1.0, num_train_timesteps: int = 1000) -> Schedule:
    """Rectified flow: sigma = tau, alpha = 1 - tau, the net is told num * tau.

    shift k moves the even grid of t towards noise, tau = k t / (1 + (k - 1) t) (Esser et al. 2024, SD3, eq. 23),
    which again multiplies sigma/alpha by k.
    """

    def tau(t: Tensor) -> Tensor:
        return shift * t / (1 + (shift - 1) * t)

    def time(i: Tensor | float) -> Tensor | float:
        return (i / num_train_timesteps) / (shift - (shift - 1) * i / num_train_timesteps)

    spec = {"kind": "flow", "shift": shift, "num_train_timesteps": num_train_timesteps}
    return Schedule("flow", lambda t: 1 - tau(t), tau, lambda t: num_train_timesteps * tau(t), time, spec)


SIGMA_DATA = 0.5  # EDM and TrigFlow: the spread of the data their nets were trained on (both papers)


def trig() -> Schedule:
    """TrigFlow: alpha = cos, sigma = SIGMA_DATA sin of the angle pi t / 2 that the net is told (Lu & Song 2024, sCM,
    section 3.1, where the noise has the spread of the data)."""
    half = math.pi / 2
    return Schedule(
        "trig",
        lambda t: (half * (1 - t)).sin(),  # cos(half t), but never below 0 at t = 1
        lambda t: SIGMA_DATA * (half * t).sin(),
        lambda t: half * t,
        lambda i: i / half,
        {"kind": "trig"},
    )


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """Variance exploding: alpha = 1, sigma from sigma_min to sigma_max, evenly in sigma^(1/rho) (Karras et al. 2022,
    EDM, eq. 5 and table 1); the net is told ln(sigma)/4."""
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def sigma(t: Tensor) -> Tensor:
        return (lo + t * (hi - lo)) ** rho

    def time(i: Tensor | float) -> Tensor | float:
        return ((math.e ** (4 * i)) ** (1 / rho) - lo) / (hi - lo)

    spec = {"kind": "edm", "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    return Schedule("edm", torch.ones_like, sigma, lambda t: sigma(t).log() / 4, time, spec)


SCHEDULES = {"ddpm": ddpm, "flow": flow, "trig": trig, "edm": edm}


def from_spec(spec: dict) -> Schedule:
    """The schedule a file's metadata describes. Raises ValueError naming the kind or option it does not know."""
    options = dict(spec)
    kind = options.pop("kind", None)
    if kind not in SCHEDULES:
        raise ValueError(f"schedule kind {kind!r} is not one of {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[kind](**options)
    except TypeError as error:
        raise ValueError(f"schedule {spec}: {error}") from None


# ------------------------------------------------------------------------------- where t is drawn from, and noise


def uniform(lo: float = 0.0, hi: float = 1.0) -> Times:
    """t ~ U(lo, hi)."""
    return lambda n, generator=None, device=None: lo + (hi - lo) * rand((n,), generator, device)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """t = sigmoid(N(mean, std^2)) (Esser et al. 2024, SD3, eq. 19)."""
    return lambda n, generator=None, device=None: (mean + std * randn((n,), generator, device)).sigmoid()


def shifted(times: Times, shift: float) -> Times:
    """Draws of `times` moved towards noise, k t / (1 + (k - 1) t)."""

    def draw(n: int, generator: Generator | None = None, device: Device = None) -> Tensor:
        t = times(n, generator, device)
        return shift * t / (1 + (shift - 1) * t)

    return draw


def randn(shape: Sequence[int], generator: Generator | None = None, device: Device = None) -> Tensor:
    """Standard normal numbers, drawn where the generator lives (so a CPU generator gives the same on any device)."""
    return torch.randn(*shape, generator=generator, device=generator.device if generator else device).to(device)


def rand(shape: Sequence[int], generator: Generator | None = None, device: Device = None) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator lives."""
    return torch.rand(*shape, generator=generator, device=generator.device if generator else device).to(device)
