"""A OneStep file as ComfyUI's own MODEL, CLIP and VAE, built from the file's metadata alone.

The weights go into ComfyUI's UNetModel, CLIPTextModel and AutoencoderKL, so that samplers, LoRA, ControlNet, FreeU and
the memory management treat them like any other model. Each function raises CheckpointError, naming the file and the
cure, where ComfyUI's classes cannot hold the architecture or the weights do not fill it.
"""

from .clip import build_clip
from .model import build_model
from .vae import build_vae

__all__ = ["build_clip", "build_model", "build_vae"]
