"""The coach tracks the student's own distribution; the difference coach - teacher tells the student where to go.

Two coaches behind one interface. LoraCoach: low-rank adapters over the teacher's weights (SwiftBrush); least memory.
CopyCoach: a second full net (DMD2); tracks best, and at small sizes a step is faster than through adapters.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

from torch import Tensor, nn

from .adapters import Lora
from .denoiser import Denoiser, Make


class Coach(Protocol):
    """What a method needs of a coach: the teacher, the coach itself, and what is trained."""

    module: nn.Module
    """Everything that has to be on the device."""
    teacher: Denoiser
    denoiser: Denoiser

    def parameters(self) -> list[nn.Parameter]:
        """What the coach's optimiser trains."""

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors alone."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave. Raises KeyError or RuntimeError for another coach's."""


class TwoNets:
    """Teacher and coach as two nets, the first frozen, of the second trained what `trained` says."""

    def __init__(self, frozen: nn.Module, trained: nn.Module | Lora, make: Make):
        coach = trained.module if isinstance(trained, Lora) else trained
        self.trained, self.module = trained, nn.ModuleDict({"teacher": frozen.requires_grad_(False), "coach": coach})
        self.teacher, self.denoiser = make(frozen), make(coach)

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return list(self.trained.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return self.trained.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave. Raises KeyError or RuntimeError for another coach's."""
        self.trained.load_state_dict(state)


class CopyCoach(TwoNets):
    """The coach is a copy of the teacher's `net`, all of it trained."""

    def __init__(self, net: nn.Module, make: Make):
        super().__init__(net, copy.deepcopy(net).requires_grad_(True), make)


class LoraCoach(TwoNets):
    """The coach is adapters over the weights of the teacher's `net`.

    how: as for Lora. Default rank 64 and alpha 128: SwiftBrush v2 (2408.14176) and NASA.
    """

    def __init__(self, net: nn.Module, make: Make, **how: Any):
        super().__init__(net, Lora(net, **how), make)
