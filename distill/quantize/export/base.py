"""Writing for loaders that lack OneStep: what stock ComfyUI reads by itself, and GGUF.

These formats round by rules of their own; what they cannot take stays dense and is listed. Files are written beside
their place and renamed, so nobody ever sees half of one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ...header import CheckpointError
from ...layouts import UNET, unet_to_ldm
from ...packed.formats.regroup import is_layer
from ..views import Renamed

BLOCK = re.compile(r"(^|\.)\w*(blocks?|layers?)\.\d+\.")
"""inside a repeated block: the first and last layers of a model, and its embeddings of time and text, are outside"""
DIFFUSERS = re.compile(
    r"(.*\.)?(single_transformer_blocks\.\d+\.|transformer_blocks\.\d+\.attn\.add_q_proj|\w+\.\d+\.attention\.to_q\.)"
)
"""transformers whose q, k, v ComfyUI joins when it loads diffusers' names"""
ENDS = re.compile(r"(^|\.)(input_blocks\.0\.0|label_emb\.\d|time_embed)\b")


@dataclass
class Written:
    """What was written, and what was not quantized and why."""

    path: Path
    layers: dict[str, float] = field(default_factory=dict)
    """quantized layer -> relative L2 error of its weight"""
    dense: dict[str, str] = field(default_factory=dict)
    """matrix weights and convolutions that stayed dense -> why"""
    left_out: list[str] = field(default_factory=list)
    """keys that the format has no place for"""


def in_ldm_names(path: Path, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A U-Net in diffusers' names under those of the single file: stock loaders rename no quantized layers."""
    blocks = re.compile(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")
    if any(DIFFUSERS.match(k) for k in weights) and not any("transformer_blocks.0.img_mod.1." in k for k in weights):
        raise CheckpointError(
            f"{path}: the weights are in diffusers' names, whose q, k and v stock loaders join, which packed weights "
            "forbid. Take the model's single file, or format onestep."
        )
    found = [match.groups() for key in weights if (match := blocks.match(key))]
    if not found:
        return weights
    attention = {int(level) for level, kind, _ in found if kind == "attentions"}
    levels = range(1 + max(int(level) for level, _, _ in found))
    kinds = ["CrossAttnDownBlock2D" if i in attention else "DownBlock2D" for i in levels]
    depth = [1 + max(int(n) for level, kind, n in found if kind == "resnets" and int(level) == i) for i in levels]
    config = {
        "down_block_types": kinds,
        "up_block_types": [k.replace("Down", "Up") for k in reversed(kinds)],
        "layers_per_block": depth,
    }
    try:
        return Renamed(weights, unet_to_ldm({k: k for k in weights}, config))
    except KeyError as e:
        raise CheckpointError(f"{path}: {e} has no place in an LDM U-Net. Write it as format onestep.") from None


def quantizable(weights: Mapping[str, Tensor], only: Collection[str] | None) -> tuple[list[str], str]:
    """(keys of weights that may be quantized, prefix of the diffusion model among the keys or "")."""
    prefix = UNET if any(k.startswith(UNET) for k in weights) else ""
    keys = [k for k in weights if k.startswith(prefix) and k.endswith(".weight")]
    if only is not None:
        names = set(only)
        return [k for k in keys if k.removesuffix(".weight") in names], prefix
    return [k for k in keys if BLOCK.search(k) and not ENDS.search(k)], prefix


def is_matrix(key: str, t: Tensor) -> bool:
    """Whether a tensor is the weight of a Linear or a convolution."""
    return is_layer(key, tuple(t.shape))
