"""The student: a net that is called once, or a few times."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor, nn

from .adapters import Lora
from .checks import positive, within
from .denoiser import Cond, Denoiser, Make
from .sample import one_step


class Student:
    """g(z, cond) -> x0: the net called once at t_in, and what of it is trained.

    z ~ N(0, 1) of the shape of x0, (B, ...). net: trained whole, or by its adapters. make turns it into a Denoiser;
    t_in in (0, 1], 1 the noisiest. then: the times of the calls that may follow, falling.
    """

    def __init__(self, net: nn.Module | Lora, make: Make, t_in: float = 1.0, then: Sequence[float] = ()):
        self.trained = net if isinstance(net, Lora) else net.requires_grad_(True)
        self.module = net.module if isinstance(net, Lora) else net
        self.make, self.times = make, [t_in, *then]
        self.denoiser: Denoiser = make(self.module)
        self._call = one_step(self.denoiser, t_in)

    def __call__(self, z: Tensor, cond: Cond = None) -> Tensor:
        return self._call(z, cond)

    def parameters(self) -> Iterable[nn.Parameter]:
        """The net's, or the adapters."""
        return self.trained.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The net's, or the adapters."""
        return self.trained.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave. Raises KeyError or RuntimeError for another student's."""
        self.trained.load_state_dict(state)


@dataclass(frozen=True)
class StudentOptions:
    """What of a student is trained, whatever the method."""

    student: Literal["full", "lora"] = "full"
    """full: all weights of a copy of the teacher. lora: adapters over the teacher's own weights, and a small file."""
    student_rank: int = 256
    """Of a LoRA student (SwiftBrush v2 256)."""
    student_alpha: float | None = None
    """Its scale is alpha / rank. Default: twice the rank (SwiftBrush v2: rank 256, alpha 512)."""
    student_targets: tuple[str, ...] | None = None
    """Layers to adapt, by name or ending, such as to_q. Default: the family's; of a U-Net every Linear and Conv2d, a
    little more than DMD2's list for SDXL."""

    student_then: tuple[float, ...] = ()
    """Timesteps of further calls, as the net counts them, falling. Each call is trained on what those before it drew
    (VSD, SDS); the student can be sampled in one step and in more."""

    def __post_init__(self) -> None:
        within(self, student_rank=(1, 2**14))
        positive(self, "student_alpha")

    @property
    def scaled_by(self) -> float:
        """student_alpha, its default worked out."""
        return 2.0 * self.student_rank if self.student_alpha is None else self.student_alpha

    def grow(
        self, teacher: nn.Module, start: nn.Module | None, targets: Sequence[str] | None, generator: Generator | None
    ) -> nn.Module | Lora:
        """What a Student takes. start: the net to train itself, or under adapters, in place of the teacher's, which
        stays as it is; targets: the family's."""
        if self.student == "full":
            return copy.deepcopy(teacher) if start is None else start
        how = {"rank": self.student_rank, "alpha": self.scaled_by, "generator": generator}
        return Lora(teacher if start is None else start, targets=self.student_targets or targets, **how)
