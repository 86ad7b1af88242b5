"""What the loop asks of a method: which nets it trains, what one iteration does, and what happens after it.

A method is a file in this folder: an options dataclass whose `build` makes the method, and a class with `nets`,
`phases` and, where it has to, `after` and `data`. It holds no optimiser; the loop and the saved state go over names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Generator, Tensor, nn

from ..denoiser import Cond, Denoiser, Make
from ..student import Student

Batches = Callable[[int, Generator], dict]
"""(step, generator) -> a batch, drawn from the generator alone: {"cond", "shape"} of prompts, {"z", "cond", "x0"} of
pairs, {"x0", "cond"} of images. Tensors may be on any device; the loop adds "device"."""
Loss = Callable[[dict, Generator], tuple[Tensor, dict[str, Tensor]]]
"""(batch, generator) -> the scalar to minimise, and readouts (scalars without gradient). What a loss leaves in the
batch, later phases of the same iteration that share it see."""
Told = Callable[..., None]
"""(what is being made, the share of it that is done, and readouts by name)."""


class Trained(Protocol):
    """A student, a coach, or any nn.Module: something with weights that an optimiser changes."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What an optimiser may change."""

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors."""

    def load_state_dict(self, state: dict[str, Tensor]) -> Any:
        """Put back what `state_dict` gave."""


class Net:
    """A net that a method trains, at a learning rate; `average` keeps a moving average of it."""

    def __init__(self, trained: Trained, lr: float, average: bool = False):
        self.trained, self.lr, self.average = trained, lr, average
        self.module: nn.Module = trained if isinstance(trained, nn.Module) else trained.module
        """All that has to be on the device, frozen parts included."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser changes."""
        return [p for p in self.trained.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Phase:
    """One optimiser step on one net."""

    net: str
    loss: Loss
    fresh: bool = True
    """Draw new batches. False: the batches of the phase before, with what its loss left in them."""


class Method:
    """The base of all methods: trains nothing, does nothing afterwards, takes batches as they are."""

    @property
    def nets(self) -> Mapping[str, Net]:
        """What is trained, by name. "student" is the one that is kept in the end."""
        raise NotImplementedError

    def phases(self, step: int) -> Iterable[Phase]:
        """What iteration `step` (from 0) does, in order."""
        raise NotImplementedError

    def after(self, step: int, averages: Mapping[str, nn.Module]) -> None:
        """After iteration `step`; averages: the nets' moving averages, as consistency targets or new teachers."""

    def data(self, batches: Batches, generator: Generator, folder: Path | None, told: Told) -> Batches:
        """Batches of prompts -> what the losses take. What is expensive to make is kept in `folder` and found again."""
        return batches


@dataclass
class Parts:
    """What options build a method from."""

    net: nn.Module
    """The teacher's net: frozen, otherwise left as it is."""
    make: Make
    """A net of this kind -> its Denoiser."""
    student: Student
    null: Cond = None
    """The empty prompt, one row."""
    weak: Denoiser | None = None
    """A worse teacher, for autoguidance."""
    generator: Generator | None = None
    """Draws initial weights, such as a coach's adapters."""
    targets: Sequence[str] | None = None
    """The layers of such a net that adapters go to; None: all that can take them."""


class Options(Protocol):
    """A dataclass of a method's options: command line, metadata and saved run are made from its fields."""

    def build(self, parts: Parts) -> Method:
        """The method, of a run's parts."""
