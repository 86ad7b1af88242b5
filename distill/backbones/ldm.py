"""U-Nets for ComfyUI's own CheckpointLoaderSimple: one file in LDM's names, and what that loader takes for granted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..header import CheckpointError
from ..layouts import UNET, VAE, Weights, unet_to_ldm, vae_to_ldm
from ..schedule import ddpm
from .base import Backbone


def checkpoint_weights(model: Backbone, net: nn.Module, texts: Weights, predictions: tuple[str, ...]) -> Weights:
    """U-Net, VAE and the text encoders, already named -> all of the file. predictions: those that the loader finds out.

    Raises CheckpointError where it would call the net in another way than it must be called.
    """
    model.need_parts("vae")
    meta, takes = model.meta, ddpm().spec
    spec = takes | {k: v for k, v in meta.schedule.items() if k in takes}
    found: dict[str, tuple[Any, Any]] = {k: (spec[k], takes[k]) for k in takes}
    found["prediction"] = meta.prediction, meta.prediction if meta.prediction in predictions else predictions[0]
    for name, (ours, theirs) in found.items():
        if ours != theirs:
            cure = "Export a diffusers folder, or a OneStep file where there is one"
            raise CheckpointError(f"{model.name}: its {name} is {ours}; ComfyUI's own loader takes {theirs}. {cure}.")
    vae = model.parts["vae"]
    weights = {UNET + k: v for k, v in unet_to_ldm(dict(net.state_dict()), net.config).items()}
    weights |= {VAE + k: v for k, v in vae_to_ldm(dict(vae.state_dict()), vae.config).items()}
    return weights | texts


def longer(weights: Weights) -> Weights:
    """OpenCLIP weights with one layer more, that adds nothing: diffusers leaves out the last layer of Stable Diffusion
    2.x's encoder, which nothing reads, and ComfyUI has a place for it."""
    layers = {int(k.split(".")[2]) for k in weights if k.startswith("transformer.resblocks.")}
    last, new = (f"transformer.resblocks.{max(layers) + i}." for i in (0, 1))
    return weights | {k.replace(last, new): torch.zeros_like(v) for k, v in weights.items() if k.startswith(last)}
