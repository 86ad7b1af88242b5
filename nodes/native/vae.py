"""Autoencoder weights and configuration -> VAE."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from ...distill.backbones.patch import PatchAutoencoder
from ...distill.file.checkpoint import check_fit
from ...distill.layouts import Weights, is_patch
from .limits import require, require_multiples, sound

FIXED = {"norm_num_groups": (32,), "act_fn": ("silu",), "mid_block_add_attention": (True,)}


def build_vae(path: Path, config: dict, weights: Weights) -> comfy.sd.VAE:
    """The file's autoencoder -> VAE."""
    return (build_patch_vae if is_patch(config) else build_kl_vae)(path, config, weights)


def build_kl_vae(path: Path, config: dict, weights: Weights) -> comfy.sd.VAE:
    """LDM-keyed AutoencoderKL weights of any depth and width, in ComfyUI's own class."""
    require(path, "VAE", config, FIXED)
    channels, latent = config["block_out_channels"], config["latent_channels"]
    require_multiples(path, "VAE", channels)
    ddconfig = {
        "double_z": True,
        "z_channels": latent,
        "resolution": 256,
        "in_channels": config.get("in_channels", 3),
        "out_ch": config.get("out_channels", 3),
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config.get("layers_per_block", 1),
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": ddconfig, "embed_dim": latent}
    with sound(path, "VAE"), torch.device("meta"):
        check_fit(path, "VAE", AutoencoderKL(**params).state_dict(), weights)
    vae = comfy.sd.VAE(sd=weights, config={"params": params})
    vae.latent_channels = latent
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(channels) - 1)
    return vae


def build_patch_vae(path: Path, config: dict, weights: Weights) -> comfy.sd.VAE:
    """The tutorial's autoencoder, which ComfyUI has no class for, behind ComfyUI's VAE."""
    with sound(path, "VAE"), torch.device("meta"):
        module = PatchAutoencoder.from_config(config)
        check_fit(path, "VAE", module.state_dict(), weights)
    module.load_state_dict(weights, assign=True)
    return ModuleVAE(module, config["channels"], config["factor"])


class ModuleVAE(comfy.sd.VAE):
    """Any module with encode(images in [-1, 1]) and decode(latents), in ComfyUI's memory management."""

    def __init__(self, module: torch.nn.Module, channels: int, factor: int):
        with silence("No VAE weights"):  # every default of the running version; it warns of no weights and stops
            super().__init__(sd={})
        self.latent_channels = channels
        self.downscale_ratio = self.upscale_ratio = factor
        self.device, self.output_device = mm.vae_device(), mm.intermediate_device()
        self.vae_dtype = mm.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model = module.eval().to(self.vae_dtype)
        mm.archive_model_dtypes(module)
        # the static patcher: the dynamic one manages ComfyUI's own layers only
        patcher = comfy.model_patcher.ModelPatcher
        self.patcher = patcher(module, load_device=self.device, offload_device=mm.vae_offload_device())
        self.model_size()


def no_vae() -> comfy.sd.VAE:
    """What ComfyUI's loaders put out for a file without a VAE: using it says so."""
    with silence("No VAE weights"):
        return comfy.sd.VAE(sd={})


@contextmanager
def silence(words: str):
    """Keep messages with these words out of the log."""
    keep = logging.Filter()
    keep.filter = lambda record: words not in record.getMessage()
    logging.getLogger().addFilter(keep)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(keep)
