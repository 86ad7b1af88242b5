"""What metadata may hold: types and ranges, in tables, checked before a module or a tensor is made.

Sizes are bounded by what such networks have. How deep one may be is bounded by the file itself (`deepest`): a loop over
layers that are not there is all that a hostile file would want.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..denoiser import PREDICTIONS
from ..schedule import POWERS
from .rules import (
    LEVELS,
    OBJECT,
    SETTINGS,
    Rule,
    Wrong,
    anything,
    every,
    maybe,
    need,
    number,
    one_of,
    per_level,
    setting,
    table,
    text,
    whole,
)

# -------------------------------------------------------------------------------------------------------- tables

SIZE, DEPTH, HEADS, SIDE = whole(1, 1 << 16), whole(1, 1 << 16), whole(1, 4096), whole(1, 2048)
BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
SHIFT = number(1e-3, 1e3)
PIXELS = 4096
"""a side of the pictures that a file is for: what is drawn where nobody says a size"""
SCHEDULES = {
    "ddpm": {
        "beta_start": number(1e-9, 0.99),
        "beta_end": number(1e-9, 0.99),
        "num_train_timesteps": whole(2, 100_000),
        "shift": SHIFT,
        "beta_schedule": one_of(*POWERS),
    },
    "flow": {"shift": SHIFT, "num_train_timesteps": whole(1, 100_000)},
    "trig": {},
    "edm": {"sigma_min": number(1e-6, 1e6), "sigma_max": number(1e-6, 1e6), "rho": number(0.1, 100)},
}


def schedule(where: str, v: Any) -> None:
    """What `schedule.from_spec` takes."""
    table({"kind": one_of(*SCHEDULES)}, ("kind",), anything)(where, v)
    table(SCHEDULES[v["kind"]] | {"kind": anything})(where, v)


UNET = table(
    {
        "sample_size": maybe(lambda where, v: (every(SIDE, 2, 2) if isinstance(v, list | tuple) else SIDE)(where, v)),
        "in_channels": SIZE,
        "out_channels": SIZE,
        "block_out_channels": every(SIZE, LEVELS),
        "down_block_types": every(one_of(*BLOCKS[:2]), LEVELS),
        "up_block_types": every(one_of(*BLOCKS[2:]), LEVELS),
        "layers_per_block": per_level(DEPTH),
        "transformer_layers_per_block": per_level(DEPTH),
        "reverse_transformer_layers_per_block": maybe(every(DEPTH, LEVELS)),
        "cross_attention_dim": SIZE,
        "attention_head_dim": per_level(HEADS),
        "num_attention_heads": maybe(per_level(HEADS)),
        "norm_num_groups": maybe(SIZE),
        "norm_eps": number(0, 1),
        "freq_shift": number(-1000, 1000),
        "dropout": number(0, 1),
        "mid_block_scale_factor": SHIFT,
        "resnet_out_scale_factor": SHIFT,
        "class_embed_type": one_of(None, "projection"),
        "num_class_embeds": one_of(None),
        "projection_class_embeddings_input_dim": maybe(SIZE),
    },
    ("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim"),
    setting,
)
"""UNet2DConditionModel's configuration."""
PATCH = table(
    {
        "type": one_of("patch"),
        "channels": SIZE,
        "factor": whole(1, 64),
        "width": SIZE,
        "depth": DEPTH,
        "detail": SIZE,
        "pyramid": every(SIZE, LEVELS),
    },
    ("channels", "factor", "width", "depth", "detail"),
)
"""PatchAutoencoder's."""
KL = table(
    {
        "in_channels": one_of(3),
        "out_channels": one_of(3),
        "latent_channels": SIZE,
        "block_out_channels": every(SIZE, LEVELS),
        "layers_per_block": DEPTH,
    },
    ("latent_channels", "block_out_channels"),
    setting,
)
"""AutoencoderKL's."""
CLIP_TEXT = table(
    {
        "vocab_size": whole(3, 1 << 20),
        "hidden_size": SIZE,
        "intermediate_size": SIZE,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "max_position_embeddings": whole(2, 1 << 16),
        "hidden_act": text(50),
        "layer_norm_eps": number(0, 1),
        "bos_token_id": whole(0, 1 << 20),
        "eos_token_id": whole(0, 1 << 20),
    },
    (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
    ),
    setting,
)
"""CLIPTextConfig's."""
PARTS: dict[str, dict[str, Rule]] = {
    "stable_diffusion": {
        "unet": UNET,
        "vae": maybe(lambda where, v: (PATCH if isinstance(v, Mapping) and v.get("type") == "patch" else KL)(where, v)),
        "text_encoder": maybe(CLIP_TEXT),
    }
}
"""Family -> the rules of its parts' configurations; of other families and parts every configuration is SETTINGS."""
TOKENS = table(
    {
        "tokenizer": table({"model": table({}, others=anything)}, ("model",), anything),
        "max_length": whole(2, 8192),
        "start": maybe(whole(0, 1 << 20)),
        "end": maybe(whole(0, 1 << 20)),
        "pad": whole(0, 1 << 20),
    },
    ("tokenizer", "max_length"),
    anything,
)
"""A tokenizer, as the tokenizers library writes it, and how many tokens a prompt becomes."""
FIELDS: dict[str, Rule] = {
    "architecture": table({}, others=maybe(SETTINGS)),
    "prediction": one_of(*PREDICTIONS),
    "schedule": schedule,
    "t_in": number(-1e6, 1e6),
    "latent": table(
        {
            "channels": SIZE,
            "scale": number(1e-6, 1e6),
            "shift": number(-1e6, 1e6),
            "factor": whole(1, 64),
            "rgb_factors": maybe(every(every(number(-1e3, 1e3), 3, 3), 1 << 16)),
            "rgb_bias": maybe(every(number(-1e3, 1e3), 3, 3)),
        },
        ("channels", "scale", "shift", "factor"),
        setting,
    ),
    "family": text(100),
    "method": text(100),
    "steps": whole(1, 1000),
    "times": maybe(every(number(-1e6, 1e6), 1000)),
    "guidance": table({"scale": number(-1e3, 1e3), "baked": one_of(True, False)}, ("scale",), anything),
    "text_encoder": maybe(TOKENS),
    "teacher": text(),
    "license": text(10_000),
    "metrics": OBJECT,
    "config": OBJECT,
    "quantization": maybe(OBJECT),
    "workflow": maybe(OBJECT),
}
"""Field of Metadata -> its rule."""


# ----------------------------------------------------------------------------------- what values say of each other


def agree(meta: Any) -> None:
    """Raise Wrong where values of a Stable Diffusion file, each right by itself, are not of one model."""
    latent, tokens = meta.latent, meta.text_encoder
    unet, vae, clip = (meta.architecture.get(name) for name in ("unet", "vae", "text_encoder"))
    rgb, levels = latent.get("rgb_factors"), len(unet["block_out_channels"])

    def same(where: str, value: Any, of: str, expected: Any) -> None:
        need(value == expected, where, value, f"{expected!r}, which follows from {of}")

    for key in ("in_channels", "out_channels"):
        same(f"architecture.unet.{key}", unet[key], "latent.channels", latent["channels"])
    for key, value in unet.items():
        if isinstance(value, list | tuple) and key != "sample_size":
            same(f"the length of architecture.unet.{key}", len(value), "block_out_channels", levels)
    side = unet.get("sample_size") or 1
    pixels = latent["factor"] * max(side if isinstance(side, list | tuple) else (side,))
    need(pixels <= PIXELS, "architecture.unet.sample_size", side, f"that of a picture of {PIXELS} pixels a side")
    if rgb is not None:
        same("the length of latent.rgb_factors", len(rgb), "latent.channels", latent["channels"])
    if vae is not None:
        patch = vae.get("type") == "patch"
        factor = vae["factor"] if patch else 2 ** (len(vae["block_out_channels"]) - 1)
        same("latent.factor", latent["factor"], "architecture.vae", factor)
        key = "channels" if patch else "latent_channels"
        same(f"architecture.vae.{key}", vae[key], "latent.channels", latent["channels"])
    if clip is None:
        return
    if tokens is None:
        raise Wrong("text_encoder", "is missing (the tokenizer)")
    width, positions, of = clip["hidden_size"], clip["max_position_embeddings"], "architecture.text_encoder"
    same("architecture.unet.cross_attention_dim", unet["cross_attention_dim"], f"{of}.hidden_size", width)
    if unet.get("class_embed_type") == "projection":
        key = "projection_class_embeddings_input_dim"
        same(f"architecture.unet.{key}", unet.get(key), f"{of}.hidden_size", width)
    need(width % clip["num_attention_heads"] == 0, f"{of}.hidden_size", width, "a multiple of num_attention_heads")
    need(tokens["max_length"] <= positions, "text_encoder.max_length", tokens["max_length"], f"at most {positions}")
    if clip["eos_token_id"] == 2:
        # as Stable Diffusion 1.x has it; transformers then pools at the highest id of a prompt (argmax), which is right
        # where the end token is the last of the vocabulary, as CLIP's is
        same("text_encoder.end", tokens.get("end"), f"{of}.eos_token_id 2", clip["vocab_size"] - 1)


def deepest(meta: Any, tensors: int) -> None:
    """Raise Wrong where the architecture has more layers than the file has tensors."""
    for part, config in meta.architecture.items():
        counts = {
            key: ints(v) for key, v in (config or {}).items() if any(w in key for w in ("layers", "depth", "blocks"))
        }
        for key, found in counts.items():
            need(
                max(found, default=0) <= tensors, f"architecture.{part}.{key}", found, f"in a file of {tensors} tensors"
            )
        if part == "unet":  # every layer has so many blocks
            both = math.prod(max(counts.get(k) or [1]) for k in ("layers_per_block", "transformer_layers_per_block"))
            need(both <= tensors, "architecture.unet", both, f"a number of layers in a file of {tensors} tensors")


def ints(v: Any) -> list[int]:
    """The whole numbers in a value and the lists and objects in it."""
    if isinstance(v, Mapping):
        v = list(v.values())
    return [n for one in v for n in ints(one)] if isinstance(v, list | tuple) else [v] * (type(v) is int)
