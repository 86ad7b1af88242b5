"""What is drawn with a model: noise to latents in its own steps, latents to pictures and back.

model = load("student.safetensors")
images = model.sample(["a red ring on a blue background"], torch.Generator().manual_seed(0))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..checks import need
from ..denoiser import Cond, Denoiser, guided
from ..file.metadata import Metadata
from ..sample import few_step, solve
from ..schedule import from_spec, randn


class Drawing:
    """The half of a Backbone that draws, the same for all families; some have a shape of their own."""

    parts: dict[str, nn.Module]
    meta: Metadata
    name: str
    device: torch.device
    null: Cond
    net: nn.Module
    denoiser: Denoiser

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
            return few_step(self.denoiser, self.meta.calls(steps))(z, cond, generator)
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


def fit(x: Tensor, module: nn.Module) -> Tensor:
    """x as a module takes it: in its weights' type, on their device."""
    return x.to(next((p for p in module.parameters() if p.is_floating_point()), x))


def to_pil(images: Tensor) -> list:
    """(B, 3, H, W) in [-1, 1] -> PIL images."""
    from PIL import Image

    array = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]
