"""A model as the rest of the library sees it: prompts in, denoisers and pictures out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import adaptable
from ..denoiser import Cond, Denoiser, from_net, map_cond
from ..file import checkpoint
from ..file.metadata import Metadata
from ..header import CheckpointError
from ..schedule import from_spec
from . import folder
from .drawing import Drawing
from .saving import Saving


class Backbone(Drawing, Saving):
    """The parts of a model as modules, and how its metadata says to call them. Everything is frozen and in eval mode.

    A family answers: encode, call, feature_layers; where the general answer is not its own, also feature, null, shape,
    noise and lora_targets; where there is such a file, from_file, comfy_weights. The rest is the same for all.
    """

    main: str
    """The part that is distilled: "unet", "transformer"."""

    def __init__(
        self,
        parts: Mapping[str, nn.Module | None],
        tokenizer: Any,
        meta: Metadata,
        name: str,
        device: str | torch.device = "cpu",
        pipeline: Any = None,
        source: Path | None = None,
    ):
        """parts: by the names of diffusers' pipelines; those that are None are left out. pipeline, source: diffusers'
        own of the same parts, and its folder, where the model was opened from one."""
        self.parts = {k: m.eval().requires_grad_(False) for k, m in parts.items() if m is not None}
        self.tokenizer, self.meta, self.name, self.device = tokenizer, meta, name, torch.device(device)
        self.pipeline, self.source = pipeline, source

    # ------------------------------------------------------------------------------- what a family answers

    @classmethod
    def from_file(
        cls, path: Path, held: checkpoint.Checkpoint, device: str | torch.device, dtype: torch.dtype
    ) -> Backbone:
        """Open a OneStep file from what it holds. Raises CheckpointError where that does not fit."""
        raise CheckpointError(f"{path}: there are no OneStep files of this family. Give its diffusers folder.")

    @classmethod
    def noise(cls, path: Path, pipe: Any) -> tuple[dict[str, Any], str]:
        """(The schedule's spec, what the net predicts), read from the pipeline's scheduler."""
        return folder.noise(path, pipe.scheduler.config)

    @classmethod
    def describe(cls, path: Path, pipe: Any) -> Metadata:
        """Metadata of a diffusers folder that OneStep did not write, from its configurations."""
        fields = folder.describe(path, pipe, *cls.noise(path, pipe))
        return Metadata(architecture={}, family=cls.__module__.rpartition(".")[2], **fields)

    def encode(self, prompts: list[str]) -> Cond:
        """B prompts -> what the net is conditioned on, batch first. "" is the null prompt."""
        raise NotImplementedError

    def call(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> Tensor:
        """A net of this family at x (B, C, h, w), index (B,), as the net counts time -> its raw prediction."""
        raise NotImplementedError

    def feature_layers(self, net: nn.Module) -> list[nn.Module]:
        """The layers whose outputs serve as features, such as a discriminator's inputs."""
        raise NotImplementedError

    def feature(self, x: Tensor, out: Any) -> Tensor:
        """What one of feature_layers put out for x (B, C, h, w), as (B, C', h', w')."""
        return out[0] if isinstance(out, tuple) else out

    @cached_property
    def null(self) -> Cond:
        """The null prompt's condition, one row; None for a net without conditions."""
        return self.encode([""])

    def lora_targets(self) -> list[str]:
        """Names of the net's layers that a LoRA adapts."""
        return list(adaptable(self.net))

    # --------------------------------------------------------------------------------------- the same for all

    @classmethod
    def from_folder(cls, path: Path, device: str | torch.device, dtype: torch.dtype) -> Backbone:
        """Open a diffusers folder; everything that metadata says is read from its configurations, or from what OneStep
        wrote there. Raises CheckpointError."""
        pipe = folder.open_pipeline(path, dtype)
        meta = folder.read_ours(path) or cls.describe(path, pipe)
        parts = {name: m.to(device) for name, m in pipe.components.items() if isinstance(m, nn.Module)}
        if dtype is torch.float16 and "vae" in parts and parts["vae"].config.get("force_upcast"):
            parts["vae"].float()
        if hasattr(parts.get("vae"), "enable_slicing"):
            parts["vae"].enable_slicing()  # a batch goes through picture by picture, in the memory of one
        return cls(parts, getattr(pipe, "tokenizer", None), meta, Path(path).name, device, pipe, Path(path))

    def need_parts(self, *names: str) -> None:
        """Raise CheckpointError where the model lacks a part."""
        for name in names:
            if name not in self.parts:
                raise CheckpointError(
                    f"{self.name}: holds no {name}. Open it from a file or folder with all its parts."
                )

    def free(self, *names: str) -> None:
        """Forget parts whose work is done, such as text encoders; folders that are written later have them all the
        same. The null prompt stays known."""
        _ = self.null
        for name in names:
            self.parts.pop(name, None)
            if self.pipeline is not None:
                setattr(self.pipeline, name, None)

    def move_net(self, device: str | torch.device) -> None:
        """The part that is distilled to a device, where from now on everything is computed. The other parts stay, and
        do their work, where they are."""
        aside, encode = self.device, self.encode

        def encode_there(prompts: list[str]) -> Cond:
            here, self.device = self.device, aside
            try:
                return map_cond(lambda c: c.to(here), encode(prompts))
            finally:
                self.device = here

        self.device, self.encode = torch.device(device), encode_there
        self.net.to(device)

    @property
    def net(self) -> nn.Module:
        """The part that is distilled."""
        return self.parts[self.main]

    def wrap(self, net: nn.Module) -> Denoiser:
        """A net of this family, such as a student or a coach, as a Denoiser."""

        def call(x: Tensor, index: Tensor, cond: Cond) -> Tensor:
            dtype = dtype_of(net, x)
            given = map_cond(lambda c: c.to(dtype) if c.is_floating_point() else c, cond)
            return self.call(net, x.to(dtype), index, given)

        return from_net(call, from_spec(self.meta.schedule), self.meta.prediction)

    @property
    def denoiser(self) -> Denoiser:
        """The model's own net as a Denoiser."""
        return self.wrap(self.net)

    def features(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> list[Tensor]:
        """The outputs (B, C, h, w) of feature_layers in one call; gradients pass."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, out: Any) -> None:
            found.append(self.feature(x, out))

        handles = [layer.register_forward_hook(keep) for layer in self.feature_layers(net)]
        try:
            self.call(net, x, index, cond)
        finally:
            for handle in handles:
                handle.remove()
        return found


def dtype_of(module: nn.Module, x: Tensor) -> torch.dtype:
    """What a module computes in, by its first weight; x's own, where it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)


def weaker(teacher: Backbone, weak: Backbone) -> Denoiser:
    """A worse teacher's net as a Denoiser, for autoguidance. Raises CheckpointError where it is called otherwise."""
    latent = ("channels", "scale", "shift", "factor")
    ours, theirs = (
        {"prediction": m.prediction, "schedule": m.schedule, **{f"latent {k}": m.latent[k] for k in latent}}
        for m in (teacher.meta, weak.meta)
    )
    cure = "Pass an early checkpoint of that teacher."
    for name in ours:
        if ours[name] != theirs[name]:
            raise CheckpointError(f"{weak.name}: {name} is {theirs[name]}, {teacher.name}'s is {ours[name]}. {cure}")
    if weak.meta.text_encoder is not None and weak.meta.text_encoder != teacher.meta.text_encoder:
        raise CheckpointError(f"{weak.name}: its words (text_encoder) are not {teacher.name}'s. {cure}")
    return teacher.wrap(weak.net)
