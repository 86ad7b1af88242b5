"""Writing for loaders that lack OneStep: what stock ComfyUI reads by itself, and GGUF.

These formats round by rules of their own; what they cannot take stays dense and is listed. Files are written beside
their place and renamed, so nobody ever sees half of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...header import CheckpointError
from ...layouts import UNET, unet_to_ldm
from ...packed.formats.regroup import is_layer
from ...packed.weight import QuantizedWeight, layers

BLOCK = re.compile(r"(^|\.)\w*(blocks?|layers?)\.\d+\.")
"""inside a repeated block: the first and last layers of a model, and its embeddings of time and text, are outside"""
DIFFUSERS = re.compile(
    r"(.*\.)?(single_transformer_blocks\.\d+\.|transformer_blocks\.\d+\.attn\.add_q_proj|\w+\.\d+\.attention\.to_q\.)"
)
"""transformers whose q, k, v ComfyUI joins when it loads diffusers' names"""
ENDS = re.compile(r"(^|\.)(input_blocks\.0\.0|label_emb\.\d|time_embed)\b")


@dataclass
class Written:
    path: Path
    layers: dict[str, float] = field(default_factory=dict)
    """quantized layer -> relative L2 error of its weight"""
    dense: dict[str, str] = field(default_factory=dict)
    """matrix weights and convolutions that stayed dense -> why"""
    left_out: list[str] = field(default_factory=list)
    """keys that the format has no place for"""


Progress = Callable[[int, int, str], None]


def write(
    path: str | Path,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    format: str,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Quantize `weights` (dense, or of the contract, which is dequantized first) and write them to `path`.

    format: int8_tensorwise, convrot_w4a4, asym_w4a8_int8, nvfp4; gguf (Q4_0) or gguf:Q4_1, :Q5_0, :Q5_1, :Q8_0, :F16,
    :BF16.
    only: layers (keys without `.weight`) to quantize; default: all in repeated blocks.
    Raises CheckpointError naming the file and the cure, ImportError where the package that knows the format is missing.
    """
    from . import comfy, gguf

    path = Path(path)
    name, _, variant = format.partition(":")
    weights = in_ldm_names(path, Dense(weights))
    if only is not None and isinstance(weights, Renamed):
        only = {
            new.removesuffix(".weight") for new, old in weights.names.items() if old.removesuffix(".weight") in only
        }
    if name == "gguf":
        return gguf.write(path, weights, metadata, variant or "Q4_0", only, progress)
    if format not in comfy.FORMATS:
        known = ", ".join((*comfy.FORMATS, *(f"gguf:{t}" for t in gguf.TYPES)))
        raise CheckpointError(f"{path}: unknown format {format!r}. Choose one of {known}.")
    return comfy.write(path, weights, metadata, format, only, progress)


class Dense(Mapping):
    """Any state dict as a dense one; a layer of the contract is dequantized when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.marked = set(layers(tensors))
        self.keys_ = [k for k in tensors if k.endswith((".weight", ".bias")) or k.rpartition(".")[0] not in self.marked]

    def __getitem__(self, key: str) -> Tensor:
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and layer in self.marked:
            return QuantizedWeight.from_tensors(self.tensors, layer).dequantize().contiguous()
        return self.tensors[key]

    def __iter__(self):
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


class Renamed(Mapping):
    """The same tensors under other names, read when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: dict[str, str]):
        self.tensors, self.names = tensors, names

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[self.names[key]]

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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


def candidates(weights: Mapping[str, Tensor], only: Collection[str] | None) -> tuple[list[str], str]:
    """(keys of weights that may be quantized, prefix of the diffusion model among the keys or "")."""
    prefix = UNET if any(k.startswith(UNET) for k in weights) else ""
    keys = [k for k in weights if k.startswith(prefix) and k.endswith(".weight")]
    if only is not None:
        names = set(only)
        return [k for k in keys if k.removesuffix(".weight") in names], prefix
    return [k for k in keys if BLOCK.search(k) and not ENDS.search(k)], prefix


def as_stored(t: Tensor) -> Tensor:
    """What stays dense: fp32 as fp16 where that holds it."""
    return t.half() if t.dtype == torch.float32 and t.numel() and t.abs().max() <= 65504 else t


def is_matrix(key: str, t: Tensor) -> bool:
    return is_layer(key, tuple(t.shape))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
