"""MODEL, CLIP and VAE, with whatever patches their weights, back into the file contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.lora
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...distill.file.checkpoint import Checkpoint
from ...distill.layouts import TEXT, UNET, VAE
from ..recipe import STORED, recipe
from .patcher import Patcher


def collect(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, vae: comfy.sd.VAE | None, workflow: dict[str, Any] | None
) -> Checkpoint:
    """What a file holds of them; a part that is None is left out. workflow: the ComfyUI graph that made them.

    Quantized layers stay packed. Raises ValueError naming the input that belongs to another file.
    """
    meta = recipe(model)
    parts = {"text_encoder": clip and clip.patcher, "vae": vae and vae.patcher}
    for name, patcher in parts.items():
        kind = "CLIP" if name == "text_encoder" else "VAE"
        if patcher is not None and recipe(patcher, kind).architecture[name] != meta.architecture[name]:
            raise ValueError(f"This {kind} is built otherwise than the MODEL's: connect the {kind} of the same loader.")
    weights = merged(model, "diffusion_model.", UNET)
    if clip is not None:
        inner = f"{clip.cond_stage_model.clip}.transformer."
        weights |= merged(clip.patcher, inner, TEXT)
        weights.pop(f"{TEXT}text_projection.weight")  # ComfyUI's, see build_clip: no student has it
    if vae is not None:
        stored = vae.patcher.get_attachment(STORED)
        weights |= {VAE + k: t.to(stored) for k, t in vae.get_sd().items()}
    changed = bool(model.patches or clip is not None and clip.patcher.patches)
    left = {name: meta.architecture[name] if patcher is not None else None for name, patcher in parts.items()}
    meta = replace(
        meta,
        architecture=meta.architecture | left,
        text_encoder=None if clip is None else recipe(clip.patcher, "CLIP").text_encoder,
        metrics={} if changed else meta.metrics,  # they were measured on other weights
        workflow=workflow,
    )
    return Checkpoint(weights, meta)


def merged(patcher: ModelPatcher, inner: str, prefix: str) -> dict[str, Tensor]:
    """Weights under `inner`, patches in them, renamed to start with `prefix`; right wherever the model is loaded.

    In the numbers of the file they came from: ComfyUI may compute in others.
    """
    weights, stored = {}, patcher.get_attachment(STORED)
    for key, (original, *patches) in patcher.get_key_patches(inner).items():
        name = prefix + key[len(inner) :]
        layer = patcher.layer(key) if isinstance(patcher, Patcher) and key.endswith(".weight") else None
        if layer is not None:
            weights |= layer.saved(name.removesuffix(".weight"), patches)
            continue
        weight, convert = original
        if patches:
            weight = comfy.lora.calculate_weight(patches, convert(weight.to(torch.float32, copy=True)), key)
        weights[name] = weight.to("cpu", stored)
    return weights
