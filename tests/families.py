"""A tiny random pipeline of every family, of the real classes: a family is a function here and a line in FAMILIES."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import tiny
import tiny_transformers
import torch
import torch.nn.functional as F
from torch import Tensor


def stable_diffusion(folder: Path) -> None:
    tiny.stable_diffusion(folder, clip=True)


def stable_diffusion_2(folder: Path) -> None:
    """With v prediction, an encoder with gelu, and a tokenizer that pads with another token than the end."""
    tiny.stable_diffusion(
        folder, prediction="v_prediction", clip=True, pad="!", text={"hidden_act": "gelu"},
        unet={"attention_head_dim": (2, 4), "use_linear_projection": True}, beta_schedule="scaled_linear",
        beta_start=0.00085, beta_end=0.012,
    )  # fmt: skip


def sdxl(folder: Path) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = tiny.clip_tokenizer(), tiny.clip_tokenizer(pad_token="!")
    config = tiny.UNET | {"in_channels": 4, "out_channels": 4, "resnet_time_scale_shift": "default"}
    config |= {"class_embed_type": None, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    config |= {"projection_class_embeddings_input_dim": 48 + 6 * 8, "cross_attention_dim": 128 + 64}
    config |= {"transformer_layers_per_block": (1, 2), "use_linear_projection": True, "attention_head_dim": (2, 4)}
    text = tiny.TEXT | {"vocab_size": len(first), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    other = {"hidden_size": 64, "projection_dim": 48, "hidden_act": "gelu", "intermediate_size": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = StableDiffusionXLPipeline(
            vae=AutoencoderKL(**tiny.VAE | {"latent_channels": 4, "scaling_factor": 0.13025}),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text | other)),
            tokenizer=first, tokenizer_2=second, unet=UNet2DConditionModel(**config),
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            add_watermarker=False,
        )  # fmt: skip
    pipe.save_pretrained(folder)


FAMILIES = {"sd1": stable_diffusion, "sd2": stable_diffusion_2, "sdxl": sdxl} | tiny_transformers.FAMILIES
SIZE = 64
"""Pixels of the pictures in these tests. Some families have no smaller models than of 1024."""


def ask(pipe: Any, z: Tensor, prompts: list[str], guidance: float = 1.0, **how: Any) -> Tensor:
    """What a diffusers pipeline of any family makes of noise z (B, C, h, w), with guidance by a second call."""
    knows = inspect.signature(pipe.__call__).parameters
    how |= {"height": SIZE, "width": SIZE}
    if "use_resolution_binning" in knows:
        how |= {"use_resolution_binning": False, "clean_caption": False}
    if "true_cfg_scale" not in knows:
        return pipe(prompts, latents=z, **{"guidance_scale": guidance} | how).images
    tokens = F.pixel_unshuffle(z, 2).flatten(2).mT  # FLUX's latents
    out = pipe(prompts, latents=tokens, true_cfg_scale=guidance, negative_prompt="", **how).images
    return F.pixel_shuffle(out.mT.unflatten(2, (z.shape[2] // 2, -1)), 2) if how["output_type"] == "latent" else out
