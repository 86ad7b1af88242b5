"""A teacher of one's own: any network that is called with (x, time) or (x, time, condition), in pixels or latents.

teacher = Own(net, shape=(1, 28, 28), prediction="eps", schedule=schedule.ddpm(1e-4, 0.02, beta_schedule="linear"))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import merged
from ..adapters import of as adapters_of
from ..denoiser import Cond
from ..file import checkpoint
from ..file.metadata import Metadata
from ..schedule import Schedule
from .base import Backbone


class Own(Backbone):
    """Conditions: what the network takes, tensors in dicts, lists and tuples, batch first; None where it takes none."""

    main = "net"
    in_comfyui = False

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        prediction: str,
        schedule: Schedule,
        *,
        null: Cond = None,
        encode: Callable[[list[str]], Cond] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device = "cpu",
    ):
        """net(x, index, cond), or net(x, index) where there are no conditions -> its prediction, as `denoiser` names
        them: x (B, *shape), index (B,) as `schedule` counts time. null: the condition that means none, one row; encode:
        prompts -> conditions; decode: what the net makes -> pictures in [-1, 1], by default as it is."""
        meta = Metadata(
            architecture={}, prediction=prediction, schedule=schedule.spec, family="own", steps=50,
            t_in=float(schedule.index(torch.ones(()))), guidance={"scale": 1.0, "baked": False},
            latent={"channels": shape[0], "scale": 1.0, "shift": 0.0, "factor": 1},
        )  # fmt: skip
        super().__init__({"net": net.to(device)}, None, meta, type(net).__name__, device)
        self.one, self.null, self.encoder, self.decoder = tuple(shape), null, encode, decode

    @classmethod
    def from_file(cls, path: Path, held: checkpoint.Checkpoint, *where: Any) -> Backbone:
        """No file holds the network's code."""
        problem = "a student of a network of its owner's own"
        raise checkpoint.CheckpointError(
            f"{path}: {problem}. Make that teacher again, and open it by teacher.open(path)."
        )

    def encode(self, prompts: list[str]) -> Cond:
        """As given; None where the network takes no conditions."""
        return None if self.encoder is None else self.encoder(prompts)

    def call(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> Tensor:
        """As its owner calls it."""
        return net(x, index) if cond is None else net(x, index, cond)

    def feature_layers(self, net: nn.Module) -> list[nn.Module]:
        """The network's own parts."""
        return list(net.children())

    def shape(self, n: int, size: int | None = None) -> tuple[int, ...]:
        """(n, *shape)."""
        return n, *self.one

    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """What the net makes -> pictures."""
        return latents if self.decoder is None else torch.cat([self.decoder(z) for z in latents.split(batch)])

    def save_student(
        self, path: str | Path, net: nn.Module, dtype: torch.dtype | None = None, *, base: str | None = None,
        **changes: Any,
    ) -> Path:  # fmt: skip
        """The weights under the network's own names, those of adapters added, in a safetensors file that says how it
        must be called. base is not needed: the file is whole."""
        if (adapters := adapters_of(net)) is not None:
            net = merged(self.net, adapters)
        student = {"steps": 1, "times": None, "teacher": self.name, "guidance": {**self.meta.guidance, "baked": True}}
        meta = replace(self.meta, **student | changes)
        return checkpoint.write(path, checkpoint.Checkpoint(dict(net.state_dict()), meta), dtype)

    def student_path(self, path: str | Path) -> Path:
        """The file's path."""
        return Path(path)

    def open(self, path: str | Path) -> Own:
        """A student that this teacher saved. Raises CheckpointError where the file is of another network."""
        held, student = checkpoint.read(path), copy.copy(self)
        net = copy.deepcopy(self.net)
        checkpoint.check_fit(path, "network", net.state_dict(), held.weights)
        net.load_state_dict(held.weights)
        student.parts, student.meta, student.name = {"net": net}, held.meta, Path(path).name
        return student
