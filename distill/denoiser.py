"""Denoisers: anything that maps (x_t, t, cond) to an estimate of x0.

Whatever a net predicts, x0 is linear in it: x0 = skip(t) x_t + out(t) raw, raw = net(scale(t) x_t, index(t), cond).
The three coefficients are all that tells one prediction type from another, and the way back is the same line solved
for raw. Losses and methods never see a prediction type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .schedule import SIGMA_DATA, Schedule, expand

Cond = Any  # tensors, batch first, in dicts, lists and tuples as the net takes them; None: no condition
Net = Callable[[Tensor, Tensor, Cond], Tensor]  # (x, index, cond) -> raw


class Denoiser(Protocol):
    """Anything that estimates x0; it knows the schedule its times mean."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t (B, ...), t (B,) in [0, 1] -> x0, of x_t's shape."""


Make = Callable[[nn.Module], Denoiser]  # e.g. lambda net: from_net(diffusers_net(net), schedule, "x0")


def map_cond(fn: Callable[..., Tensor], *conds: Cond) -> Cond:
    """fn over the tensors of conditions of one structure, as `fn(a, b, ...)`; None where the first is None.

    map_cond(lambda *rows: torch.cat(rows), c1, c2) joins two batches. Raises ValueError where structures differ.
    """
    first = conds[0]
    if first is None or isinstance(first, Tensor):
        return None if first is None else fn(*conds)
    if isinstance(first, Mapping):
        if any(not isinstance(c, Mapping) or c.keys() != first.keys() for c in conds):
            raise ValueError(f"conditions differ: {sorted(first)} and {[sorted(c or ()) for c in conds[1:]]}")
        return {k: map_cond(fn, *(c[k] for c in conds)) for k in first}
    if any(len(c) != len(first) for c in conds):
        raise ValueError(f"conditions differ: {[len(c) for c in conds]} parts")
    return type(first)(map_cond(fn, *parts) for parts in zip(*conds))


# ------------------------------------------------------------------------------------------- prediction types


def _vp_v(alpha: Tensor, sigma: Tensor) -> tuple:  # v = alpha eps - sigma x0; the norm is 1 where alpha^2 + sigma^2 = 1
    norm = alpha**2 + sigma**2
    return alpha / norm, -sigma / norm, 1


def _edm(alpha: Tensor, sigma: Tensor) -> tuple:  # Karras et al. 2022, table 1, on x_t / alpha
    s, sd = sigma / alpha, SIGMA_DATA
    norm = (s**2 + sd**2).sqrt()
    return sd**2 / norm**2 / alpha, s * sd / norm, 1 / norm / alpha


PREDICTIONS: dict[str, Callable] = {  # (alpha, sigma) -> skip, out, scale
    "x0": lambda alpha, sigma: (0, 1, 1),
    "eps": lambda alpha, sigma: (1 / alpha, -sigma / alpha, 1),
    "v": _vp_v,
    "flow": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma), 1),  # u = eps - x0
    "trig": lambda alpha, sigma: (alpha, -sigma, 1 / SIGMA_DATA),  # on the trig schedule
    "edm": _edm,
}


def coefficients(prediction: str, schedule: Schedule, t: Tensor, x: Tensor) -> tuple:
    """(skip, out, scale) at t, ready to multiply x. Raises ValueError for a prediction that is not in PREDICTIONS."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[prediction](expand(schedule.alpha(t), x), expand(schedule.sigma(t), x))


def to_x0(raw: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, prediction: str) -> Tensor:
    """What the net said -> x0."""
    skip, out, _ = coefficients(prediction, schedule, t, x_t)
    return skip * x_t + out * raw


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, prediction: str) -> Tensor:
    """x0 -> what a net of this prediction type would have said."""
    skip, out, _ = coefficients(prediction, schedule, t, x_t)
    return (x0 - skip * x_t) / out


# --------------------------------------------------------------------------------------- networks as denoisers


@dataclass(frozen=True)
class NetDenoiser:
    """A network and its prediction type as a Denoiser; x0 comes out in fp32 whatever the net computes in."""

    net: Net
    schedule: Schedule
    prediction: str

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        skip, out, scale = coefficients(self.prediction, self.schedule, t, x_t)
        return skip * x_t + out * self.net(scale * x_t, self.schedule.index(t), cond).float()


def from_net(net: Net, schedule: Schedule, prediction: str) -> NetDenoiser:
    """net(x, index, cond) -> raw, wrapped."""
    return NetDenoiser(net, schedule, prediction)


def diffusers_net(unet: Any) -> Net:
    """A diffusers U-Net as a Net; the keys of cond are its keyword arguments (encoder_hidden_states, class_labels)."""
    return lambda x, index, cond: unet(x, index, **(cond or {}), return_dict=False)[0]


# ---------------------------------------------------------------------------------------------------- guidance


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance at t <= until, uncond + w (cond - uncond), in one batch (Ho & Salimans 2022, eq. 6)."""

    denoiser: Denoiser
    w: float | Tensor
    null: Cond
    until: float = 1.0

    @property
    def schedule(self) -> Schedule:
        """The denoiser's own."""
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.with_plain(x_t, t, cond)[0]

    def with_plain(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The guided x0, and the unguided one that was computed on the way."""
        if self.until < 1 and bool((t > self.until).all()):  # half the work, as of a solver's first steps
            given = self.denoiser(x_t, t, cond)
            return given, given
        doubled = map_cond(lambda v, n: torch.cat([v, like_batch(n, v)]), cond, self.null)
        given, unknown = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), doubled).chunk(2)
        w = self.w if self.until >= 1 else torch.where(t <= self.until, self.w, 1.0)
        w = expand(w, x_t) if isinstance(w, Tensor) else w
        return unknown + w * (given - unknown), given


def guided(denoiser: Denoiser, w: float | Tensor, null: Cond, until: float = 1.0) -> Denoiser:
    """The denoiser with guidance w: a number, or (B,) numbers, one per sample. null: the empty prompt, one row or B.
    until: guide only at t up to this (Kynkaanniemi et al. 2024).

    w = 1 is the denoiser itself. Raises ValueError when w asks for an empty prompt and there is none.
    """
    if not isinstance(w, Tensor) and w == 1:
        return denoiser
    if null is None:
        raise ValueError(f"guidance {w} needs the empty prompt (null); pass its embeddings or use guidance 1")
    return Guided(denoiser, w, null, until)


@dataclass(frozen=True)
class Autoguided:
    """Guidance away from a weaker version of the same net, x0 + (w - 1) (plain - weak) (Karras et al. 2024, eq. 3).

    What the weak net gets wrong the net itself gets wrong too, only less: the step from one to the other, prolonged,
    points to the data. Unlike a step away from the empty prompt it does not narrow what a prompt can look like. Both
    add up: `denoiser` may be guided.
    """

    denoiser: Denoiser
    weak: Denoiser
    w: float

    @property
    def schedule(self) -> Schedule:
        """The denoiser's own."""
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.with_plain(x_t, t, cond)[0]

    def with_plain(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The guided x0, and the net's own."""
        x0, plain = with_plain(self.denoiser, x_t, t, cond)
        return x0 + (self.w - 1) * (plain - self.weak(x_t, t, cond)), plain


def autoguided(denoiser: Denoiser, w: float, weak: Denoiser | None) -> Denoiser:
    """The denoiser, guided by w away from `weak`; w = 1 is the denoiser itself. Raises ValueError when w asks for one
    and there is none."""
    if w == 1:
        return denoiser
    if weak is None:
        raise ValueError(f"autoguidance {w} needs a weaker teacher; pass one or use autoguidance 1")
    return Autoguided(denoiser, weak, w)


def with_plain(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """x0 of the denoiser and x0 of the same denoiser without guidance, in one call."""
    if isinstance(denoiser, Guided | Autoguided):
        return denoiser.with_plain(x_t, t, cond)
    x0 = denoiser(x_t, t, cond)
    return x0, x0


def like_batch(null: Tensor, v: Tensor) -> Tensor:
    """One row of null repeated to the batch of v; a full batch is left as it is."""
    return null.to(v).expand_as(v) if len(null) == 1 else null.to(v)


def drop(cond: Cond, null: Cond, keep: Tensor) -> Cond:
    """cond with the null prompt in the rows where keep (B,) is False."""
    if cond is None or null is None:
        return cond
    return map_cond(lambda v, n: torch.where(expand(keep, v), v, like_batch(n, v)), cond, null)
