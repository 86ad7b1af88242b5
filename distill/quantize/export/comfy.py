"""What stock ComfyUI loads by itself, through comfy-kitchen's own layouts: it decodes what it encodes here.

Per layer, beside `L.weight`: `L.comfy_quant` (JSON) and

    int8_tensorwise   weight_scale (N, 1)                                              any ComfyUI since 0.12 or so
    convrot_w4a4      weight_scale                                                     0.29
    nvfp4             weight_scale (blocks of 16), weight_scale_2
    asym_w4a8_int8    weight_s_rel, weight_s_channel, weight_codebook                  0.30, comfy-kitchen 0.2.31

Stock operations quantize no convolution. Its model detection reads the width of the first cross-attention's keys and of
the class embedding from shapes that packing would change: these stay dense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...atomic import write_beside
from ...header import CheckpointError
from ...packed.weight import MARK, to_bytes
from ..options import Progress
from ..source import as_stored, relative
from .base import Written, is_matrix, quantizable

FORMATS = ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8", "nvfp4")
ROTATIONS = (256, 64, 16)
"""columns that ConvRot mixes: powers of 4, the largest that divides K"""
COUNTED = re.compile(r"(^|\.)(blocks\.0\.norm1\.linear|layers\.0\.(self_attn\.to_qkv|to_local_embed\.0))\.weight$")


def write(
    path: Path,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    format: str,
    only: Collection[str] | None,
    progress: Progress | None,
) -> Written:
    """As `export.write`, in one of FORMATS."""
    from safetensors.torch import save_file

    encode = encoder(format)
    keys, prefix = quantizable(weights, only)
    wanted, counted = set(keys), detected(weights)
    out: dict[str, Tensor] = {}
    done = Written(path)
    for i, key in enumerate(weights):
        if progress:
            progress(i, len(weights), "quantizing")
        t = weights[key]
        if not is_matrix(key, t) or not key.startswith(prefix):
            out[key] = as_stored(t).contiguous() if key.startswith(prefix) else t.contiguous()
            continue
        why = "not chosen" if key not in wanted else "read by ComfyUI's model detection" if key in counted else ""
        why = why or unfit(format, tuple(t.shape))
        layer = key.removesuffix(".weight")
        if why:
            out[key], done.dense[layer] = as_stored(t).contiguous(), why
            continue
        tensors, spec, back = encode(t.float())
        done.layers[layer] = relative(back.float(), t.float())
        out |= {key + suffix: v.contiguous() for suffix, v in tensors.items()}
        out[f"{layer}.{MARK}"] = to_bytes(spec)
    if not done.layers:
        raise CheckpointError(f"{path}: no layer takes format {format}. Choose another, or quantize as onestep.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda temporary: save_file(out, temporary, dict(metadata)))
    return done


def detected(keys: Mapping[str, Tensor]) -> set[str]:
    """Weights inside blocks whose columns stock detection counts: the first attn2.to_k, for the width of the text, and
    single ones of CogVideoX and Stable Audio."""
    found = [k for k in keys if k.endswith("attn2.to_k.weight") and not re.search(r"(middle|output|up|mid)_block", k)]
    first = min(found, key=lambda k: [int(n) for n in re.findall(r"\d+", k)], default=None)
    return {first} | {k for k in keys if COUNTED.search(k)}


def unfit(format: str, shape: tuple[int, ...]) -> str:
    """Why a weight of this shape stays dense; "" where the format takes it."""
    if len(shape) != 2:
        return "a convolution"
    n, k = shape
    step = 64 if format == "convrot_w4a4" else 16
    if k % step:
        return f"{k} columns are no multiple of {step}"
    return f"{n} rows are no multiple of 16" if n % 16 else ""


def encoder(format: str) -> Callable[[Tensor], tuple[dict[str, Tensor], dict[str, Any], Tensor]]:
    """fp32 matrix -> (suffix -> tensor, JSON of the mark, what it decodes to)."""
    try:
        from comfy_kitchen import tensor as kitchen
    except ImportError:
        raise ImportError(f"format {format} needs comfy-kitchen: pip install comfy-kitchen") from None
    names = {
        "int8_tensorwise": "TensorWiseINT8Layout",
        "convrot_w4a4": "TensorCoreConvRotW4A4Layout",
        "asym_w4a8_int8": "AsymW4A8Int8Layout",
        "nvfp4": "TensorCoreNVFP4Layout",
    }
    layout = getattr(kitchen, names[format], None)
    if layout is None:
        raise ImportError(f"format {format} needs a newer comfy-kitchen: pip install -U 'comfy-kitchen>=0.2.40'")

    def encode(w: Tensor) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        rotation = next((r for r in ROTATIONS if w.shape[1] % r == 0), None)
        options, spec = {
            "int8_tensorwise": ({"per_channel": True}, {}),
            "convrot_w4a4": ({"convrot_groupsize": rotation}, {"convrot_groupsize": rotation}),
            "asym_w4a8_int8": ({"convrot_groupsize": rotation}, {"group_size": 16, "convrot_groupsize": rotation}),
            "nvfp4": ({}, {}),
        }[format]
        codes, params = layout.quantize(w, **options)
        back = layout.dequantize(codes, params)
        return layout.state_dict_tensors(codes, params), {"format": format} | spec, back

    return encode
