"""The coach tracks the student's own distribution; the difference coach - teacher tells the student where to go.

Two coaches behind one interface. LoraCoach: one frozen net, low-rank adapters on or off (SwiftBrush); least memory.
CopyCoach: a second full net (DMD2); tracks best, and at small sizes a step is faster than through adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from .denoiser import Cond, Denoiser, Make
from .schedule import Schedule


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

    def close(self) -> None:
        """Give the teacher's net back as it was; the coach is gone."""


class CopyCoach:
    """Teacher and coach as two nets: `net` itself, frozen, and a copy of it that is trained."""

    def __init__(self, net: nn.Module, make: Make):
        frozen, trained = net.requires_grad_(False), copy.deepcopy(net).requires_grad_(True)
        self.module = nn.ModuleDict({"teacher": frozen, "coach": trained})
        self.teacher, self.denoiser = make(frozen), make(trained)

    def parameters(self) -> list[nn.Parameter]:
        """All of the copy."""
        return list(self.module["coach"].parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's weights."""
        return self.module["coach"].state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.module["coach"].load_state_dict(state)

    def close(self) -> None:
        """Nothing to do: the teacher was never touched."""


class LoraCoach:
    """Teacher and coach as two views of one frozen net: adapters off, adapters on (peft).

    `net` is wrapped in place: copy the student from it first, and from then on call it through .teacher.
    Default rank 64 and alpha 128: SwiftBrush v2 (2408.14176) and NASA. targets: names or endings of names of the
    layers to adapt; default all Linear and Conv2d: in the tutorial world a coach on attention alone could not follow
    the student (its loss rose sevenfold). The adapters start at zero effect: the coach starts as the teacher.
    """

    def __init__(
        self,
        net: nn.Module,
        make: Make,
        *,
        rank: int = 64,
        alpha: float | None = None,
        targets: list[str] | None = None,
        generator: Generator | None = None,
    ):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        every = [name for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=targets or every)
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
            self.module = inject_adapter_in_model(config, net.requires_grad_(False))
        self._layers = [m for m in self.module.modules() if isinstance(m, BaseTunerLayer)]
        self._adapters = {name: p for name, p in self.module.named_parameters() if "lora_" in name}
        for name, p in self._adapters.items():
            if "lora_A" in name:  # the same law as peft's, from our generator; lora_B is zero
                nn.init.kaiming_uniform_(p, a=5**0.5, generator=generator)
        self.denoiser: Denoiser = make(self.module)
        self.teacher: Denoiser = _Off(self.denoiser, self.adapters_off)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The net is the teacher inside."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def close(self) -> None:
        """Take the adapters off the net for good."""
        for name, module in list(self.module.named_modules()):
            if module in self._layers:
                parent, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(parent), leaf, module.get_base_layer())

    def parameters(self) -> list[nn.Parameter]:
        """The adapters."""
        return list(self._adapters.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The adapters by name."""
        return {name: p.detach() for name, p in self._adapters.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave. Raises KeyError for adapters of another rank, net or other targets."""
        if state.keys() != self._adapters.keys():
            odd = sorted(state.keys() ^ self._adapters.keys())
            raise KeyError(f"the saved coach has other adapters, e.g. {odd[0]}: same rank, targets and net needed")
        with torch.no_grad():
            for name, p in self._adapters.items():
                p.copy_(state[name])


class _Off:
    """A denoiser called with the adapters off."""

    def __init__(self, denoiser: Denoiser, adapters_off: Callable):
        self.denoiser, self.adapters_off = denoiser, adapters_off

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        with self.adapters_off():
            return self.denoiser(x_t, t, cond)
