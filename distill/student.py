"""The student: a net that is called once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .denoiser import Cond, Denoiser, Make
from .sample import one_step


class Student:
    """g(z, cond) -> x0: the net called once at t_in, and the net itself for whoever trains it.

    z ~ N(0, 1) of the shape of x0, (B, ...). make turns the net into a Denoiser; t_in in (0, 1], 1 the noisiest.
    """

    def __init__(self, module: nn.Module, make: Make, t_in: float = 1.0):
        self.module, self.make, self.t_in = module.requires_grad_(True), make, t_in
        self.denoiser: Denoiser = make(module)
        self._call = one_step(self.denoiser, t_in)

    def __call__(self, z: Tensor, cond: Cond = None) -> Tensor:
        return self._call(z, cond)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The net's."""
        return self.module.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The net's."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Into the net."""
        self.module.load_state_dict(state)
