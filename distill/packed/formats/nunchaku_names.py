"""Whole nunchaku files -> ComfyUI's own names: Flux.1 (both of nunchaku's versions), Qwen-Image, Z-Image, SDXL.

Flux: ComfyUI computes a single block's q, k, v and MLP as one layer, and its two outputs as another; nunchaku keeps all
four apart. They are joined here (codes side by side, low-rank branches as blocks), which changes no number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...header import CheckpointError
from ...layouts import unet_to_ldm
from .nunchaku import FIELDS, Unpacked, layer, split_rows, stack_columns, stack_rows

DOUBLE = {
    **{"qkv_proj": "img_attn.qkv", "attn.to_qkv": "img_attn.qkv"},
    **{"qkv_proj_context": "txt_attn.qkv", "attn.add_qkv_proj": "txt_attn.qkv"},
    **{"out_proj": "img_attn.proj", "attn.to_out.0": "img_attn.proj"},
    **{"out_proj_context": "txt_attn.proj", "attn.to_add_out": "txt_attn.proj"},
    **{"mlp_fc1": "img_mlp.0", "ff.net.0.proj": "img_mlp.0", "mlp_fc2": "img_mlp.2", "ff.net.2": "img_mlp.2"},
    **{"mlp_context_fc1": "txt_mlp.0", "ff_context.net.0.proj": "txt_mlp.0"},
    **{"mlp_context_fc2": "txt_mlp.2", "ff_context.net.2": "txt_mlp.2"},
    **{"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"},
    **{"norm_q": "img_attn.norm.query_norm", "norm_k": "img_attn.norm.key_norm"},
    **{"norm_added_q": "txt_attn.norm.query_norm", "norm_added_k": "txt_attn.norm.key_norm"},
}
SINGLE = {
    **{"qkv_proj": "linear1.a", "attn.to_qkv": "linear1.a", "mlp_fc1": "linear1.b"},
    **{"out_proj": "linear2.a", "attn.to_out": "linear2.a", "mlp_fc2": "linear2.b"},
    **{"norm.linear": "modulation.lin", "norm_q": "norm.query_norm", "norm_k": "norm.key_norm"},
}
REST = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
AFTER_GELU = re.compile(r"(mlp_fc2|mlp_context_fc2|ff\.net\.2|ff_context\.net\.2|(img|txt)_mlp\.net\.2)$")
"""the second linear layer of Flux's and Qwen-Image's MLPs; SDXL's comes after a GEGLU"""
SDXL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}


def is_nunchaku(weights: Mapping[str, Tensor]) -> bool:
    """Whether keys are those of a nunchaku file."""
    return any(k.endswith(".qweight") and k.removesuffix("qweight") + "wscales" in weights for k in weights)


def convert(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole state dict in contract form and ComfyUI's names. Raises CheckpointError."""
    family = _family(path, weights)
    packed: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    names = {k.removesuffix(".qweight") for k in weights if k.endswith(".qweight")}
    for key, value in weights.items():
        prefix, _, last = key.rpartition(".")
        if prefix in names:
            if last not in FIELDS:
                raise CheckpointError(
                    f"{path}: nunchaku layer {prefix} has an unknown tensor {last!r}. Update OneStep."
                )
            if FIELDS[last]:
                packed.setdefault(prefix, {})[FIELDS[last]] = value
        else:
            dense[key] = value
    unpacked = {n: layer(path, n, p, family != "sdxl" and bool(AFTER_GELU.search(n))) for n, p in packed.items()}
    try:
        return {"flux": _flux, "qwen": _qwen, "sdxl": _sdxl, "z-image": _z_image}[family](path, unpacked, dense)
    except KeyError as e:
        raise CheckpointError(f"{path}: no place in {family} for nunchaku's {e}. Get another version of it.") from None


def _family(path: Path, weights: Mapping[str, Tensor]) -> str:
    for family, start in (("flux", "single_transformer_blocks.0."), ("sdxl", "down_blocks.1.attentions.")):
        if any(k.startswith(start) for k in weights):
            return family
    if any(k.startswith("transformer_blocks.0.img_mod.1.") for k in weights):
        return "qwen"
    if any(k.startswith("layers.0.attention.to_") for k in weights) and "cap_embedder.1.weight" in weights:
        return "z-image"
    raise CheckpointError(
        f"{path}: a nunchaku file of another model than Flux.1, Qwen-Image, Z-Image or SDXL. "
        "Load it with ComfyUI-nunchaku, or quantize the original with OneStep."
    )


def _flux(path: Path, unpacked: dict[str, Unpacked], dense: dict[str, Tensor]) -> dict[str, Tensor]:
    out, halves = {}, {}
    for name, value in unpacked.items():
        key = _flux_name(name)
        if key.endswith((".linear1.a", ".linear1.b", ".linear2.a", ".linear2.b")):
            halves[key] = value
        else:
            out |= value.entries(key)
    for key, a in halves.items():
        if key.endswith(".a"):
            whole = key[:-2]
            out |= _joined(path, whole, a, halves.get(f"{whole}.b")).entries(whole)
    if len(halves) % 2 or any(f"{k[:-1]}a" not in halves for k in halves):
        raise CheckpointError(f"{path}: a single block has half of its layers. Download the file again.")
    for name, value in dense.items():
        stem, _, last = name.rpartition(".")
        if stem == "norm_out.linear":  # diffusers has (scale, shift), Flux (shift, scale)
            value = torch.cat(value.chunk(2)[::-1])
        out[f"{_flux_name(stem)}.{last}"] = value
    return out


def _joined(path: Path, name: str, a: Unpacked, b: Unpacked | None) -> Unpacked:
    """Two layers of one input (linear1) or whose outputs are added (linear2) as one."""
    alike = b is not None and (a.bias is None, a.weight.up is None) == (b.bias is None, b.weight.up is None)
    if alike and a.weight.scale.dtype == b.weight.scale.dtype:
        if name.endswith("2") and a.weight.shape[0] == b.weight.shape[0]:
            return stack_columns(a, b)
        if name.endswith("1") and (whole := stack_rows(a, b)) is not None:
            return whole
    raise CheckpointError(
        f"{path}: the two halves of {name} do not fit each other (shapes, smoothing or missing tensors), and "
        "ComfyUI's Flux needs them joined. Get another version of the file."
    )


def _flux_name(name: str) -> str:
    if match := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name):
        single, number, part = match.groups()
        part = part if part in (SINGLE if single else DOUBLE) else part.removeprefix("attn.")  # attn.norm_q, version 2
        return f"single_blocks.{number}.{SINGLE[part]}" if single else f"double_blocks.{number}.{DOUBLE[part]}"
    return REST[name]


def _qwen(path: Path, unpacked: dict[str, Unpacked], dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's names are diffusers'; q, k, v come apart."""
    out = dict(dense)
    for name, value in unpacked.items():
        stem, _, last = name.rpartition(".")
        if last in ("to_qkv", "add_qkv_proj"):
            targets = ("to_q", "to_k", "to_v") if last == "to_qkv" else ("add_q_proj", "add_k_proj", "add_v_proj")
            for target, piece in zip(targets, split_rows(value, 3)):
                out |= piece.entries(f"{stem}.{target}")
        else:
            out |= value.entries(name)
    return out


def _sdxl(path: Path, unpacked: dict[str, Unpacked], dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Qwen-Image's, and from diffusers' names to those of the single file (without its prefix)."""
    return unet_to_ldm(_qwen(path, unpacked, dense), SDXL)


Z_IMAGE = (
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1.", "x_embedder."),
    (".attention.to_qkv.", ".attention.qkv."),
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
    (".feed_forward.net.2.", ".feed_forward.w2."),
)
"""diffusers -> ComfyUI"""


def _z_image(path: Path, unpacked: dict[str, Unpacked], dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """nunchaku joins the gated MLP's w3 and w1, in this order; where it left blocks dense, their q, k, v are apart."""

    def renamed(key: str) -> str:
        for theirs, ours in Z_IMAGE:
            key = key.replace(theirs, ours)
        return key

    out, gated, attention = {}, ".feed_forward.net.0.proj", re.compile(r"(.+\.attention\.)to_[qkv]\.(\w+)")
    for name, value in unpacked.items():
        if value.bias is not None and not value.bias.any():  # the model has none there
            value = Unpacked(value.weight, None)
        if name.endswith(gated):
            stem = name.removesuffix("net.0.proj")
            for part, piece in zip(("w3", "w1"), split_rows(value, 2)):
                out |= piece.entries(stem + part)
        else:
            out |= value.entries(renamed(f"{name}.").removesuffix("."))
    for key, value in dense.items():
        if match := attention.fullmatch(key):
            start, last = match.groups()
            if f"{start}qkv.{last}" not in out:
                out[f"{start}qkv.{last}"] = torch.cat([dense[f"{start}to_{c}.{last}"] for c in "qkv"])
        elif gated in key:
            stem, last = key.replace("net.0.proj.", "\0").split("\0")
            for part, piece in zip(("w3", "w1"), value.chunk(2)):
                out[f"{stem}{part}.{last}"] = piece.contiguous()
        else:
            out[renamed(key)] = value
    return out
