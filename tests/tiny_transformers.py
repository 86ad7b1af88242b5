"""Tiny random pipelines of transformer families, saved as diffusers saves them; every class is the real one.

Widths are the smallest that ComfyUI knows a family by where that is small: heads of 64 channels and as many blocks as
heads for SD3, heads of 128 for FLUX.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import tiny
import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz,"
KL = {
    "block_out_channels": (16, 16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip


def random(make: Callable, *args: Any, **config: Any) -> torch.nn.Module:
    """A module whose every weight matters: what starts flat or at zero is moved."""
    module = make(*args, **config)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return module.eval()


def clip(width: int) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tiny.clip_tokenizer()), hidden_size=width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=32, bos_token_id=54, eos_token_id=55,
    )  # fmt: skip
    return random(transformers.CLIPTextModelWithProjection, config)


def t5(width: int) -> tuple[torch.nn.Module, Any]:
    """An encoder of T5 v1.1 and its tokenizer, with letters as its vocabulary."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    words = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return random(transformers.T5EncoderModel, config), words


def gemma(width: int) -> tuple[torch.nn.Module, Any]:
    """Gemma 2, of which Sana takes the last hidden states, and its tokenizer."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = transformers.GemmaTokenizer(
        vocab={t: i for i, t in enumerate([*special, "▁", *LETTERS])}, merges=[], add_bos_token=True
    )
    config = transformers.Gemma2Config(
        vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
    )  # fmt: skip
    return random(transformers.Gemma2Model, config), words


def sd3(folder: Path, **config: Any) -> Path:
    """SD3.5: a block with a second attention, and normalised queries and keys."""
    encoder, words = t5(48)
    net = {
        "sample_size": 8, "pos_embed_max_size": 12, "num_layers": 2, "attention_head_dim": 64,
        "num_attention_heads": 2, "joint_attention_dim": 48, "caption_projection_dim": 128,
        "pooled_projection_dim": 40, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    parts = {
        "transformer": random(diffusers.SD3Transformer2DModel, **net | config),
        "vae": vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": clip(16), "text_encoder_2": clip(24), "text_encoder_3": encoder,
        "tokenizer": tiny.clip_tokenizer(), "tokenizer_2": tiny.clip_tokenizer(), "tokenizer_3": words,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip
    return save(diffusers.StableDiffusion3Pipeline(**parts), folder)


def flux(folder: Path, dev: bool = True, **config: Any) -> Path:
    """FLUX.1 dev (guidance embedded, shift by size) or schnell."""
    encoder, words = t5(32)
    net = {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 1,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": dev,
    }  # fmt: skip
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    pipe = diffusers.FluxPipeline(
        transformer=random(diffusers.FluxTransformer2DModel, **net | config),
        vae=vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=random(transformers.CLIPTextModel, clip(16).config), tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=encoder, tokenizer_2=words,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
    )  # fmt: skip
    return save(pipe, folder)


def pixart(folder: Path, sigma: bool = False, **config: Any) -> Path:
    """PixArt-alpha at 1024, which is told the picture's size, or -sigma, which is not; both predict a variance too."""
    encoder, words = t5(24)
    net = {
        "sample_size": 64 if sigma else 128, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12,
        "cross_attention_dim": 24, "caption_channels": 24, "use_additional_conditions": not sigma,
    }  # fmt: skip
    make = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    pipe = make(
        transformer=random(diffusers.PixArtTransformer2DModel, **net | config),
        vae=vae(latent_channels=4, scaling_factor=0.13025 if sigma else 0.18215),
        text_encoder=encoder, tokenizer=words,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )  # fmt: skip
    return save(pipe, folder)


def sana(folder: Path, flow_shift: float = 3.0, **config: Any) -> Path:
    """Sana with its deep-compression autoencoder, here of factor 4."""
    encoder, words = gemma(24)
    net = {
        "in_channels": 8, "out_channels": 8, "sample_size": 8, "num_layers": 2, "num_attention_heads": 2,
        "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
        "cross_attention_dim": 16, "caption_channels": 24,
    }  # fmt: skip
    blocks = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (16, 16, 32),
            "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), (5,)),
        }.items()
    }  # fmt: skip
    pipe = diffusers.SanaPipeline(
        transformer=random(diffusers.SanaTransformer2DModel, **net | config),
        vae=random(diffusers.AutoencoderDC, latent_channels=8, attention_head_dim=8, scaling_factor=0.41, **blocks),
        text_encoder=encoder, tokenizer=words,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
    )  # fmt: skip
    return save(pipe, folder)


def vae(**config: Any) -> torch.nn.Module:
    """AutoencoderKL of factor 4, quantizing convolutions left out as SD3's and FLUX's do."""
    plain = {"use_quant_conv": False, "use_post_quant_conv": False} if "shift_factor" in config else {}
    return random(diffusers.AutoencoderKL, **KL | plain | config)


def save(pipe: Any, folder: Path) -> Path:
    """Its folder; parts that are None are named by its index alone."""
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return folder


def without(folder: Path, copy: Path, *numbers: str) -> Path:
    """A copy of a folder that lacks text encoders and their tokenizers, by the ends of their names."""
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    for name in [f"{kind}{n}" for n in numbers for kind in ("text_encoder", "tokenizer")]:
        shutil.rmtree(copy / name)
        index[name] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd3": sd3,
    "flux": flux,
    "schnell": lambda folder: flux(folder, dev=False),
    "pixart": pixart,
    "sigma": lambda folder: pixart(folder, sigma=True),
    "sana": sana,
}


def make(name: str, folder: Path) -> Path:
    """A family's pipeline, always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[name](folder)
