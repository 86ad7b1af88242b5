"""A recipe in ComfyUI's terms: what rides with a MODEL from its file (and survives clones, LoRA and other patches), the
sigmas, the sampler, and the MODEL that knows what its net puts out."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST, X0, ModelSamplingDiscrete, ModelSamplingDiscreteFlow

from ..distill.file.metadata import Metadata
from ..distill.recipes.recipe import Recipe, of_file
from ..distill.recipes.steps import DOWN, advance

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
    """ComfyUI's sigmas (steps + 1,) of a OneStep file: from its t_in down by even steps (trailing), ending in 0."""
    return levels(of_file(meta), steps)


def levels(recipe: Recipe, steps: int, sampling: torch.nn.Module | None = None) -> torch.Tensor:
    """ComfyUI's sigmas (steps + 1,) of a recipe, ending in 0: sigma / alpha of DDPM schedules, sigma of flows.

    sampling: a MODEL's, whose own table of noise levels is asked where the recipe counts by it: a LoRA's base may have
    another (zero terminal SNR). Raises ValueError for a number of steps that the recipe does not take.
    """
    times = recipe.timesteps(steps)
    if sampling is not None and hasattr(sampling, "log_sigmas") and recipe.clock["kind"] == "ddpm":
        found = [sampling.sigma(torch.tensor(t)).item() for t in times]
    else:
        found = [recipe.sigma(t) for t in times]
    return torch.tensor([*found, 0.0])


# -------------------------------------------------------------------------------------------------- what a net puts out


class Clean(ModelSamplingDiscrete, X0):
    """A net with a DDPM schedule that puts out x0."""


class FlowToImage(ModelSamplingDiscreteFlow, CONST):
    """A net that puts out the flow from noise to image (Rectified Flow's sign; SD3 and FLUX have the other)."""

    def calculate_denoised(self, sigma, model_output, model_input):
        return super().calculate_denoised(sigma, -model_output, model_input)


def patched(model: ModelPatcher, recipe: Recipe) -> ModelPatcher:
    """The MODEL, knowing what its net puts out by the recipe. Raises ValueError where it cannot be of that kind."""
    native = model.get_model_object("model_sampling")
    flow = isinstance(native, CONST)
    if recipe.prediction == "flow to the image":
        sampling = FlowToImage()
    elif flow != (recipe.clock["kind"] == "flow"):
        kind = "a flow model" if flow else "no flow model"
        raise ValueError(
            f"This MODEL is {kind}, and {recipe.title} is the other kind. Choose the family it is of; where there is "
            "none, sample it with KSampler."
        )
    elif recipe.prediction == "x0" and not isinstance(native, X0):
        sampling = Clean()
        sampling.set_sigmas(native.sigmas)
    else:
        return model
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    return model


# ------------------------------------------------------------------------------------------------------------ sampling


class FewStepSampler(comfy.samplers.KSAMPLER):
    """Predict x0, keep the noise down to a level, noise again up to the next sigma, and so on; with one step, predict
    and be done. The arguments are fields of a Recipe; without any it is the sampler of OneStep's students.

    Stock samplers give noise of unit variance only when they start at the model's largest sigma: a student called at
    t_in 399 would get 0.758 of it. Here it is the same at any t_in (distill.sample.one_step's, where it was trained).
    """

    def __init__(self, step: str = "renoise", noise: str = "unit", eta: float = 0.0, ends: int | None = None):
        super().__init__(sample_few_step, {"step": step, "noise": noise, "eta": eta, "ends": ends})

    @classmethod
    def of(cls, recipe: Recipe) -> FewStepSampler:
        return cls(recipe.step, recipe.noise, recipe.eta, recipe.ends)

    def max_denoise(self, model_wrap, sigmas) -> bool:
        return True


@torch.no_grad()
def sample_few_step(
    model, x, sigmas, extra_args=None, callback=None, disable=None, step="renoise", noise="unit", eta=0.0, ends=None
):
    """The k-diffusion signature: x (B, C, H, W) noised to sigmas[0]; returns it at the last sigma, which is x0 at 0."""
    extra_args = extra_args or {}
    sampling = model.inner_model.inner_model.model_sampling
    generator = torch.Generator().manual_seed(((extra_args.get("seed") or 0) + 1) % 2**64)  # not the first noise again
    one, zero, first = torch.ones(1, device=x.device), torch.zeros(1, device=x.device), sigmas[:1]

    def signal(sigma):
        return sampling.noise_scaling(sigma, zero.clone(), one.clone())

    given, wanted = (sampling.noise_scaling(first, one.clone(), zero, full) for full in (True, False))
    if noise == "unit":
        wanted = (wanted**2 + signal(first) ** 2).sqrt()
    x = x * (wanted / given)
    for i, (now, then) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        comfy.model_management.throw_exception_if_processing_interrupted()
        x0 = model(x, now.expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": now, "sigma_hat": now, "denoised": x0})
        if then > 0:
            down = DOWN[step](now, then, eta, sampling.timestep, sampling.sigma)
            fresh = torch.randn(x.shape, generator=generator).to(x) if step != "euler" else zero
            x = advance(x, x0, now, down, then, fresh, signal)
        elif ends is None:
            x = x0
        else:  # where diffusers' DDIM and TCD schedulers end: at a timestep's level, in the scale of x_t
            last = sampling.sigma(torch.tensor(float(ends), device=x.device)).to(x)
            x = (x0 + last * (x - x0) / now) / (1 + last**2).sqrt()
    return x
