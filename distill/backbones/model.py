"""A OneStep file, loaded to be used outside ComfyUI: prompts in, pictures out.

model = load(bundled("student"))
images = model.sample(["a red ring on a blue background"], torch.Generator().manual_seed(0))
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ..denoiser import Cond, Denoiser, diffusers_net, from_net, guided
from ..file import checkpoint
from ..file.metadata import Metadata, read_metadata
from ..header import CheckpointError
from ..sample import few_step, one_step, solve, trailing
from ..schedule import from_spec, randn
from ..tutorial.bundled import bundled


@dataclass
class Model:
    """The parts of one file as modules, and how its metadata says to call them."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    meta: Metadata
    name: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def wrap(self, unet: Any) -> Denoiser:
        """A U-Net of this file's kind, such as a student or a coach, as a Denoiser."""
        return from_net(diffusers_net(unet), from_spec(self.meta.schedule), self.meta.prediction)

    @property
    def denoiser(self) -> Denoiser:
        """The file's own U-Net as a Denoiser."""
        return self.wrap(self.unet)

    def latent_shape(self, n: int, size: int | None = None) -> tuple[int, int, int, int]:
        """(n, C, h, w) for square pictures of `size` pixels, by default the size the U-Net was trained at."""
        side = size // self.meta.latent["factor"] if size else self.unet.config.sample_size
        return n, self.meta.latent["channels"], side, side

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """Prompts to what the U-Net is conditioned on: encoder_hidden_states (B, L, D), and class_labels (B, P) where
        it takes the pooled text. "" is the null prompt."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        out = self.text_encoder(ids.to(self.device))
        cond = {"encoder_hidden_states": out.last_hidden_state}
        if self.unet.config.class_embed_type == "projection":
            cond["class_labels"] = out.pooler_output
        return cond

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """What the U-Net puts out (B, C, h, w) -> pictures (B, 3, H, W) in [-1, 1]."""
        latents = latents / self.meta.latent["scale"] + self.meta.latent["shift"]
        parts = [self.vae.decode(z) for z in latents.split(batch)]
        return torch.cat([getattr(p, "sample", p) for p in parts]).clamp(-1, 1)

    @torch.no_grad()
    def latents(
        self, z: Tensor, cond: Cond, steps: int | None = None, guidance: float | None = None, solver: str = "dpm++",
        generator: Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """z ~ N(0, 1) -> x0, as the file says: a student in its own steps, a teacher through `solver` with guidance."""
        steps = steps or self.meta.steps
        if self.meta.guidance.get("baked"):
            t_in = self.denoiser.schedule.time(self.meta.t_in)
            if steps == 1:
                return one_step(self.denoiser, t_in)(z, cond)
            return few_step(self.denoiser, [t_in * t for t in trailing(steps)])(z, cond, generator)
        w = self.meta.guidance["scale"] if guidance is None else guidance
        return solve(guided(self.denoiser, w, self.encode([""])), z, cond, solver=solver, steps=steps)

    def sample(
        self, prompts: list[str], generator: Generator, batch: int = 128, size: int | None = None, **how: Any
    ) -> Tensor:
        """Prompts -> pictures (B, 3, H, W) in [-1, 1]; noise comes from `generator`. how: as for `latents`."""
        images = []
        for i in range(0, len(prompts), batch):
            some = prompts[i : i + batch]
            z = randn(self.latent_shape(len(some), size), generator, self.device)
            images.append(self.decode(self.latents(z, self.encode(some), generator=generator, **how)))
        return torch.cat(images)


def load(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """Load a OneStep file in fp32. Raises CheckpointError where it is not sound or lacks the text encoder or VAE."""
    meta = read_metadata(path)
    unet, vae, text_encoder, tokenizer = checkpoint.build(path, device)
    if vae is None or text_encoder is None:
        missing = "VAE" if vae is None else "text encoder"
        raise CheckpointError(f"{path}: holds no {missing}. Export the file with all three parts.")
    return Model(unet, vae, text_encoder, tokenizer, meta, Path(path).name, torch.device(device))


def weak_teacher(teacher: Model, path: str | Path | None = None) -> Denoiser:
    """A worse teacher, for autoguidance, from a OneStep file. Default: the bundled teacher's early checkpoint.

    Raises CheckpointError where it is called otherwise than the teacher.
    """
    path = path or bundled("weak")
    meta = read_metadata(path)
    for name in ("prediction", "schedule"):
        ours, theirs = getattr(teacher.meta, name), getattr(meta, name)
        if ours != theirs:
            problem = f"{name} is {theirs}, {teacher.name}'s is {ours}"
            raise CheckpointError(f"{path}: {problem}. Pass an early checkpoint of that teacher.")
    return teacher.wrap(checkpoint.build(path, teacher.device).unet.requires_grad_(False))


def save_student(path: str | Path, source: Model, unet: Any, **changes: Any) -> Path:
    """Write a student that shares the text encoder, VAE and way of being called, in half precision.

    changes: fields of Metadata, at least method; guidance is marked as baked in and steps as 1 unless they say else.
    """
    student = {"steps": 1, "guidance": {**source.meta.guidance, "baked": True}, "teacher": source.name, "metrics": {}}
    student["quantization"] = None
    meta = replace(source.meta, **(student | changes))
    parts = [dict(m.state_dict()) for m in (unet, source.vae, source.text_encoder)]
    return checkpoint.write(path, checkpoint.pack(checkpoint.Pipeline(*parts, meta)), torch.float16)


def to_pil(images: Tensor) -> list:
    """(B, 3, H, W) in [-1, 1] -> PIL images."""
    from PIL import Image

    array = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]
