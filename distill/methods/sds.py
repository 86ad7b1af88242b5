"""Score distillation sampling (DreamFusion, 2209.14988): VSD without a coach, as a contrast.

    g = w(t) (x - x0_T(x_t, t, c))

The truth x stands where the coach's estimate of it should be. Each sample is pulled to the teacher's mean and nothing
holds the samples apart, so their spread decays to zero: pretty pictures, all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .vsd import VSD


@dataclass(frozen=True)
class SDSOptions:
    weight: Literal["dmd", "swiftbrush", "one"] = "swiftbrush"
    """Weight w of the student's gradient, losses.WEIGHTS. swiftbrush: sigma^2 on eps, DreamFusion's own."""
    guidance: float = 1.5
    """Guidance of the teacher; the same as VSD's default, so that the two can be compared (DreamFusion: 100)."""
    guidance_max: float | None = None
    """If set, guidance is drawn per sample from U(guidance, guidance_max)."""
    guidance_until: float = 1.0
    """Guide only at t up to this; as VSD's."""
    autoguidance: float = 1.0
    """Guidance away from a weaker teacher; as VSD's."""
    t_min: float = 0.02
    """DreamFusion draws t from 2 to 98 %."""
    t_max: float = 0.98
    """See t_min."""


class SDS(VSD):
    """As VSD; of its `coach` only the teacher is called."""

    options: SDSOptions
    coach_loss = None

    def coach_says(self, x: Tensor, x_t, t, cond, w) -> tuple[Tensor, Tensor]:
        return x.detach(), x.detach()
