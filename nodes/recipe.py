"""The recipe that rides with a MODEL: how its file wants to be called. It survives clones, LoRA and other patches."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ..distill.file.metadata import Metadata
from ..distill.schedule import from_spec

KEY, STORED = "onestep", "onestep.dtype"


def attach(patcher: ModelPatcher, meta: Metadata, dtype: torch.dtype) -> None:
    """Let a MODEL, or what is behind a CLIP or a VAE, say what file it came from, and how that stores numbers."""
    patcher.set_attachments(KEY, meta)
    patcher.set_attachments(STORED, dtype)


def recipe(patcher: ModelPatcher, kind: str = "MODEL") -> Metadata:
    """The metadata of the file it came from. Raises ValueError naming the cure where it came from elsewhere."""
    meta = patcher.get_attachment(KEY)
    if meta is None:
        instead = ", or sample it with KSampler instead" if kind == "MODEL" else ""
        raise ValueError(f"This {kind} has no OneStep recipe. Load it with OneStep Load Student{instead}.")
    return meta


def sigmas(meta: Metadata, steps: int) -> torch.Tensor:
    """ComfyUI's sigmas (steps + 1,): from the file's t_in down by even steps (trailing), ending in 0.

    ComfyUI's sigma is sigma / alpha for DDPM schedules and sigma itself for flow.
    """
    schedule = from_spec(meta.schedule)
    t = schedule.time(meta.t_in) * (1 - torch.arange(steps, dtype=torch.float64) / steps)  # (steps,)
    sigma = schedule.sigma(t) if schedule.name == "flow" else schedule.sigma(t) / schedule.alpha(t)
    return torch.cat([sigma, torch.zeros(1)]).float()


class FewStepSampler(comfy.samplers.KSAMPLER):
    """Predict x0, noise it again to the next sigma, and so on; with one step, predict and be done.

    Stock samplers give noise of unit variance only when they start at the model's largest sigma: a student called at
    t_in 399 would get 0.758 of it. Here it is the same at any t_in (distill.sample.one_step's, where it was trained).
    """

    def __init__(self):
        super().__init__(sample_few_step)

    def max_denoise(self, model_wrap, sigmas) -> bool:
        return True


@torch.no_grad()
def sample_few_step(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The k-diffusion signature: x (B, C, H, W) noised to sigmas[0]; returns x0."""
    extra_args = extra_args or {}
    sampling = model.inner_model.inner_model.model_sampling
    generator = torch.Generator().manual_seed(((extra_args.get("seed") or 0) + 1) % 2**64)  # not the first noise again
    one, zero, first = torch.ones(1, device=x.device), torch.zeros(1, device=x.device), sigmas[:1]
    noise, signal = sampling.noise_scaling(first, one.clone(), zero), sampling.noise_scaling(first, zero.clone(), one)
    given = sampling.noise_scaling(first, one.clone(), zero, True)
    x = x * ((noise**2 + signal**2).sqrt() / given)
    for i, sigma in enumerate(sigmas[:-1]):
        comfy.model_management.throw_exception_if_processing_interrupted()
        x0 = model(x, sigma.expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})
        if i + 2 < len(sigmas):
            fresh = torch.randn(x.shape, generator=generator).to(x)
            x = sampling.noise_scaling(sigmas[i + 1], fresh, x0)
    return x0
