"""Score distillation sampling (DreamFusion, 2209.14988): VSD without a coach, as a contrast.

    g = w(t) (x - x0_T(x_t, t, c))

The truth x stands where the coach's estimate of it should be. Each sample is pulled to the teacher's mean and nothing
holds the samples apart, so their spread decays to zero: pretty pictures, all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from torch import Tensor

from ..checks import positive
from ..denoiser import Cond, Denoiser
from ..sample import Generate
from ..schedule import Times
from .base import Net, Parts, Phase
from .vsd import VSD, check_times


@dataclass(frozen=True)
class SDSOptions:
    """Options of score distillation without a coach."""

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
    lr: float = 2e-4
    """Learning rate of the student; as VSD's."""

    def __post_init__(self) -> None:
        check_times(self)
        positive(self, "lr")

    def build(self, parts: Parts) -> SDS:
        """The method."""
        return SDS(self, parts.student, parts.make(parts.net.requires_grad_(False)), parts.null, weak=parts.weak)


class SDS(VSD):
    """As VSD, with a teacher alone."""

    options: SDSOptions

    def __init__(
        self,
        options: SDSOptions,
        student: Generate,
        teacher: Denoiser,
        null: Cond = None,
        times: Times | None = None,
        weak: Denoiser | None = None,
    ):
        super().__init__(options, student, SimpleNamespace(teacher=teacher), null, times, weak)

    @property
    def nets(self) -> dict[str, Net]:
        return {"student": Net(self.student, self.options.lr, average=True)}

    def phases(self, step: int) -> Iterator[Phase]:
        yield from self.student_phases()

    def coach_says(self, x: Tensor, x_t: Tensor, t: Tensor, cond: Cond, w: float | Tensor) -> tuple[Tensor, Tensor]:
        """The samples themselves, where VSD has the coach's estimate of them."""
        return x.detach(), x.detach()
