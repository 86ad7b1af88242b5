"""Tiny random models of the tutorial's architecture, written through the file contract."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from distill.backbones import load
from distill.backbones.patch import PatchAutoencoder
from distill.file import checkpoint

WORDS = [
    "a",
    "small",
    "large",
    "red",
    "green",
    "blue",
    "ring",
    "square",
    "circle",
    "on",
    "background",
    "top",
    "bottom",
    "left",
    "right",
    ",",
]
RGB = [[0.1 * (i % 3), 0.05 * i, -0.1] for i in range(8)]
LATENT = {"channels": 8, "scale": 1.0, "shift": 0.0, "factor": 8, "rgb_factors": RGB, "rgb_bias": [0.5, 0.5, 0.5]}
DDPM = {
    "kind": "ddpm",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "shift": 4.0,
}
FLOW = {"kind": "flow", "shift": 3.0, "num_train_timesteps": 1000}
UNET = {
    "in_channels": 8,
    "out_channels": 8,
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 128,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 1.0,
}
TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def tokenizer(pad: str = "<end>"):
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<start>", "<end>", "<other>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<start>", eos_token="<end>", pad_token=pad, model_max_length=32
    )


def modules(seed: int = 0, vae: str = "patch", text: dict | None = None, pad: str = "<end>", **unet_config) -> Modules:
    """Random weights; `unet_config` overrides UNET, text TEXT; vae is "patch" (the tutorial's) or "kl"; pad: the token
    that prompts are filled with."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**UNET | unet_config)
        vae = PatchAutoencoder(width=32) if vae == "patch" else AutoencoderKL(**VAE)
        words = tokenizer(pad)
        text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **TEXT | (text or {})))
        with torch.no_grad():  # norms and embeddings start flat: make every weight matter
            for module in (unet, vae, text_encoder):
                for weight in module.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
            text_encoder.get_input_embeddings().weight.add_(
                torch.randn_like(text_encoder.get_input_embeddings().weight)
            )
    return Modules(unet.eval(), vae.eval(), text_encoder.eval(), words)


class Modules(NamedTuple):
    """The parts of a model."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any


def build(path) -> Modules:
    """A file's parts, as `distill` opens it."""
    model = load(path)
    return Modules(*(model.parts.get(name) for name in Modules._fields[:3]), model.tokenizer)


def pipeline(mods: Modules, **meta) -> checkpoint.Pipeline:
    """`meta` overrides: a one-step x0 student at the last timestep."""
    fields = {"prediction": "x0", "schedule": DDPM, "t_in": 999, "latent": LATENT, "method": "vsd", "steps": 1}
    fields |= {"guidance": {"scale": 2.0, "baked": True}}
    return checkpoint.from_modules(*mods, **fields | meta)


def write(
    path, dtype=None, seed: int = 0, vae="patch", text: dict | None = None, unet: dict | None = None,
    pad: str = "<end>", **meta
):  # fmt: skip
    """Write a tiny random file and return its path."""
    return checkpoint.write(path, checkpoint.pack(pipeline(modules(seed, vae, text, pad, **unet or {}), **meta)), dtype)


def clip_tokenizer(**special):
    """CLIP's own tokenizer class, with single letters as its vocabulary; special: as pad_token."""
    from transformers import CLIPTokenizer

    letters = "!abcdefghijklmnopqrstuvwxyz,"
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=32, **special)


def stable_diffusion(
    folder, max_shard_size="1GB", prediction="epsilon", clip=False, pad=None, text=None, unet=None, **scheduler
):
    """A tiny random Stable Diffusion as diffusers saves it; its folder. clip: with CLIP's own tokenizer class, and
    eos_token_id 2 in the text encoder's configuration, as Stable Diffusion 1.x has it; pad: the token it pads with.
    text, unet: more of their configurations."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = UNET | {"in_channels": 4, "out_channels": 4, "class_embed_type": None}
    config |= {"projection_class_embeddings_input_dim": None, "resnet_time_scale_shift": "default"} | (unet or {})
    words = clip_tokenizer(**{"pad_token": pad} if pad else {}) if clip else tokenizer()
    text = TEXT | ({"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1} if clip else {}) | (text or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "unet": UNet2DConditionModel(**config),
            "vae": AutoencoderKL(**VAE | {"latent_channels": 4, "scaling_factor": 0.7}),
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **text)),
        }
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, **scheduler)
    rest = {"tokenizer": words, "scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(**parts, **rest, requires_safety_checker=False)
    pipe.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def decode(mods: Modules, latent: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> images (B, 3, H, W) in [-1, 1]."""
    image = mods.vae.decode(latent)
    return getattr(image, "sample", image).clamp(-1, 1)


@torch.no_grad()
def encode(mods: Modules, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Prompts -> the U-Net's keyword arguments."""
    ids = mods.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    out = mods.text_encoder(ids)
    return {"encoder_hidden_states": out.last_hidden_state, "class_labels": out.pooler_output}  # (B, 32, D), (B, D)
