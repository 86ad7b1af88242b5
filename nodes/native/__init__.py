"""A OneStep file as ComfyUI's own MODEL, CLIP and VAE, built from the file's metadata alone.

The weights go into ComfyUI's UNetModel, CLIPTextModel and AutoencoderKL, so that samplers, LoRA, ControlNet and the
memory management treat them like any other model. Each function raises CheckpointError, naming the file and the
cure, where ComfyUI's classes cannot hold the architecture or the weights do not fill it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...distill.file import checkpoint
from ...distill.header import CheckpointError
from ...distill.layouts import TEXT, UNET, VAE
from ...distill.packed.formats import Loaded
from ..recipe import attach
from .clip import build_clip
from .model import build_model
from .packed import float_dtype
from .vae import build_vae


def load(
    path: Path,
    embeddings: list[str],
    disable_dynamic: bool = False,
    activations: str = "auto",
    loaded: Loaded | None = None,
) -> tuple:
    """A file -> (MODEL, CLIP or None, VAE or None); `embeddings` are the folders of textual inversions.

    activations: of layers that are quantized in the file, see distill.packed.layers; loaded: the file, read already.
    """
    c = checkpoint.read(path, loaded)
    if c.meta.family != "stable_diffusion":
        raise CheckpointError(f"{path}: of the family {c.meta.family!r}, which is not known here. Update OneStep.")
    unet, text, vae = (checkpoint.part(c.weights, prefix) for prefix in (UNET, TEXT, VAE))
    stored = [part and float_dtype(part) for part in (unet, text, vae)]  # now: ComfyUI empties what it loads
    model = build_model(path, c.meta, unet, disable_dynamic, activations)
    clip = build_clip(path, c.meta, text, embeddings, disable_dynamic, activations) if text else None
    vae = build_vae(path, c.meta.architecture["vae"], vae) if vae else None
    for patcher, dtype in zip((model, clip and clip.patcher, vae and vae.patcher), stored):
        if patcher is not None:
            attach(patcher, c.meta, dtype)
    for i, patcher in enumerate((model, clip and clip.patcher)):
        if patcher is not None:  # ComfyUI loads the weights again for other GPUs and for hooks on part of a prompt
            patcher.cached_patcher_init = (partial(patchers, activations=activations), (path, embeddings), i)
    return model, clip, vae


def patchers(path: Path, embeddings: list[str], disable_dynamic: bool = False, activations: str = "auto") -> tuple:
    model, clip, _ = load(path, embeddings, disable_dynamic, activations)
    return model, clip and clip.patcher
