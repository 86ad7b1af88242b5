"""A tiny random pipeline of every family, of the real classes: a family is a function here and a line in FAMILIES."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch


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


FAMILIES = {"sd1": stable_diffusion, "sd2": stable_diffusion_2, "sdxl": sdxl}
