"""What flows into the layers of a OneStep file while ComfyUI makes pictures with it: calibration without diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.samplers
import torch

from ...distill.file.metadata import Metadata
from ...distill.layouts import TEXT, UNET
from ...distill.quantize.calibrate import LayerStats, collect
from ...distill.quantize.options import Quantize
from ...distill.quantize.prompts import given_prompts
from ...distill.schedule import from_spec
from ...distill.tutorial import shapes
from ...distill.tutorial.prompts import is_vocabulary
from ..recipe import FewStepSampler, sigmas
from . import load

LAYERS = torch.nn.Linear | torch.nn.Conv2d


def calibrate(
    path: Path, meta: Metadata, prompts: list[str], text: bool, progress: Callable[[int, int, str], None], seed: int = 0
) -> dict[str, LayerStats]:
    """Key of each layer in the file -> its inputs, over one picture a prompt, made as the file's recipe says.

    text: the text encoder's layers, too.
    """
    model, clip, _ = load(path, [], disable_dynamic=True)
    nets = torch.nn.ModuleDict({"unet": model.model.diffusion_model})
    keys = {"unet.": UNET}
    if text:
        nets["text"] = getattr(clip.cond_stage_model, clip.cond_stage_model.clip).transformer
        keys["text."] = TEXT
    names = {}
    for name, module in nets.named_modules():
        if isinstance(module, LAYERS):
            part = next(p for p in keys if name.startswith(p))
            names[name] = keys[part] + name[len(part) :]

    def run() -> None:
        for i, prompt in enumerate(prompts):
            progress(i, len(prompts), "calibrating")
            picture(model, clip, meta, prompt, seed + i)

    return collect(nets, names, run, seed=seed)


def picture(model, clip, meta: Metadata, prompt: str, seed: int) -> None:
    """Sample one, the way the file recommends; what comes out is of no interest."""
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(p)) for p in (prompt, ""))
    size = meta.architecture["unet"].get("sample_size") or 32  # one number, or height and width
    latent = torch.zeros(1, meta.latent["channels"], *([size, size] if isinstance(size, int) else size))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    student = meta.guidance.get("baked")
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive} | ({} if student else {"negative": negative}))
    guider.set_cfg(1.0 if student else meta.guidance["scale"])
    sampler = FewStepSampler() if student else comfy.samplers.sampler_object("euler")
    guider.sample(noise, latent, sampler, sigmas(meta, meta.steps), disable_pbar=True, seed=seed)


def default_prompts(meta: Metadata, seed: int = 0) -> tuple[list[str], str]:
    """(64 for one step, 16 for a teacher's many; what to call them): of the tutorial's world for its own models."""
    count = 64 if meta.guidance.get("baked") else 16
    if is_vocabulary(meta.text_encoder["tokenizer"].get("model", {}).get("vocab", ())):
        return shapes.sample_prompts(count, torch.Generator().manual_seed(seed)), f"{count} prompts"
    return given_prompts(Quantize(), count)


def said(meta: Metadata, prompts: str) -> str:
    """What the report says about it; prompts: what to call them."""
    t = float(from_spec(meta.schedule).time(meta.t_in))
    where = f"t = {meta.t_in:g}" if meta.steps == 1 else f"{meta.steps} steps from time {t:.3g}"
    return f"calibrated on {prompts} at {where}, in ComfyUI"
