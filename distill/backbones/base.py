"""A model as the rest of the library sees it: prompts in, denoisers and pictures out.

model = load("student.safetensors")
images = model.sample(["a red ring on a blue background"], torch.Generator().manual_seed(0))
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..adapters import adaptable
from ..checks import need
from ..denoiser import Cond, Denoiser, from_net, guided, map_cond
from ..file import checkpoint
from ..file.metadata import Metadata
from ..header import CheckpointError
from ..sample import few_step, solve
from ..schedule import from_spec, randn
from . import folder
from .saving import Saving


class Backbone(Saving):
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

    def time(self, t_in: float | None = None) -> float:
        """A timestep as the net counts them -> t in [0, 1]; default: where the model is first called. Raises ValueError
        for one that the schedule does not have."""
        index = self.meta.t_in if t_in is None else t_in
        t = float(from_spec(self.meta.schedule).time(index))
        need(0 < t <= 1, "t_in", index, f"above 0 and at most {self.last_index():g}, as the net counts timesteps")
        return t

    def last_index(self) -> float:
        """The noisiest timestep, as the net counts them."""
        return float(from_spec(self.meta.schedule).index(torch.ones(())))

    def shape(self, n: int, size: int | None = None) -> tuple[int, int, int, int]:
        """(n, C, h, w) of latents for square pictures of `size` pixels, by default the size the net was trained at."""
        sample = self.net.config.sample_size
        h, w = (sample, sample) if isinstance(sample, int) else sample
        if size is not None:
            h = w = size // self.meta.latent["factor"]
        return n, self.meta.latent["channels"], h, w

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

    def to_latents(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> what the net sees, (B, C, h, w); the mean of the VAE's posterior."""
        z = self.parts["vae"].encode(fit(pictures, self.parts["vae"]))
        if not isinstance(z, Tensor):
            z = z.latent_dist.mean if hasattr(z, "latent_dist") else z.latent
        return ((z - self.meta.latent["shift"]) * self.meta.latent["scale"]).to(self.device)

    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """What the net puts out (B, C, h, w) -> pictures (B, 3, H, W) in [-1, 1]; gradients pass."""
        latents = latents / self.meta.latent["scale"] + self.meta.latent["shift"]
        latents = fit(latents, self.parts["vae"])
        parts = [self.parts["vae"].decode(z) for z in latents.split(batch)]
        return torch.cat([getattr(p, "sample", p) for p in parts]).float().clamp(-1, 1)

    @torch.no_grad()
    def latents(
        self, z: Tensor, cond: Cond, steps: int | None = None, guidance: float | None = None, solver: str = "dpm++",
        generator: Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """z ~ N(0, 1) -> x0, as the file says: a student in its own steps, a teacher through `solver` with guidance.

        Raises ValueError for steps below 1, or a guidance for a student, which has its own in its weights.
        """
        steps = self.meta.steps if steps is None else steps
        need(steps >= 1, "steps", steps, "1 or more")
        if self.meta.guidance.get("baked"):
            need(guidance is None, "guidance", guidance, f"{self.name} is a student, its guidance is in its weights")
            times = [self.time(i) for i in self.meta.timesteps(steps)]
            return few_step(self.denoiser, times)(z, cond, generator)
        w = self.meta.guidance["scale"] if guidance is None else guidance
        return solve(guided(self.denoiser, w, self.null), z, cond, solver=solver, steps=steps)

    @torch.no_grad()
    def sample(
        self, prompts: list[str], generator: Generator, batch: int = 128, size: int | None = None, **how: Any
    ) -> Tensor:
        """Prompts -> pictures (B, 3, H, W) in [-1, 1]; noise comes from `generator`. how: as for `latents`."""
        images = []
        for i in range(0, len(prompts), batch):
            some = prompts[i : i + batch]
            z = randn(self.shape(len(some), size), generator, self.device)
            images.append(self.decode(self.latents(z, self.encode(some), generator=generator, **how)))
        return torch.cat(images)


def dtype_of(module: nn.Module, x: Tensor) -> torch.dtype:
    """What a module computes in, by its first weight; x's own, where it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)


def fit(x: Tensor, module: nn.Module) -> Tensor:
    """x as a module takes it: in its weights' type, on their device."""
    return x.to(next((p for p in module.parameters() if p.is_floating_point()), x))


def encode_all(model: Backbone, prompts: list[str], batch: int = 64) -> Cond:
    """Any number of prompts, encoded in batches."""
    parts = [model.encode(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
    return map_cond(lambda *rows: torch.cat(rows), *parts)


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


def to_pil(images: Tensor) -> list:
    """(B, 3, H, W) in [-1, 1] -> PIL images."""
    from PIL import Image

    array = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]
