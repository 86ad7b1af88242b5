"""safetensors files: OneStep's own, ComfyUI's comfy_quant and scaled_fp8, and dense ones. Tensors are mapped.

What stock ComfyUI reads by itself passes through as it is; layers of this package's formats are checked against the
contract before anybody computes with them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...metadata import CheckpointError
from ..weight import FORMATS, MARK, QuantError, QuantizedWeight, layers, read_mark

STOCK = (
    *("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"),
    *("int8_blockwise", "svdquant_w4a4"),
)
"""formats of comfy_quant that ComfyUI's own operations take, this version's or a newer one's"""
LAYERS = "_quantization_metadata"
"""where a file keeps its marks in the metadata instead: {"layers": {name: {"format": ...}}}"""


def check(path: Path, weights: dict[str, Tensor], metadata: Mapping[str, str], stock: Collection[str]) -> str:
    """Check every marked layer; returns the file's kind. Adds the marks that stand in the metadata."""
    for name, spec in _marks_in_metadata(path, metadata).items():
        if f"{name}.weight" in weights:
            text = json.dumps(spec).encode()
            weights.setdefault(f"{name}.{MARK}", torch.tensor(list(text), dtype=torch.uint8))
    ours = False
    marked = layers(weights)
    for name in marked:
        try:
            known = read_mark(weights, name)["format"]
            if known in FORMATS:
                QuantizedWeight.from_tensors(weights, name)
                ours = True
        except QuantError as e:
            raise CheckpointError(f"{path}: {e}") from None
        if known not in FORMATS and known not in stock:
            raise CheckpointError(
                f"{path}: layer {name} has the unknown format {known!r}. "
                f"Update OneStep or ComfyUI, or get the model as one of {', '.join((*FORMATS, *stock))}."
            )
        if f"{name}.weight" not in weights:
            raise CheckpointError(f"{path}: layer {name} has no weight beside its {MARK}. Download it again.")
    if ours:
        return "onestep"
    if marked:
        return "comfy_quant"
    return "scaled_fp8" if any(k == "scaled_fp8" or k.endswith(".scaled_fp8") for k in weights) else "dense"


def _marks_in_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if LAYERS not in metadata:
        return {}
    try:
        found = json.loads(metadata[LAYERS])["layers"]
        sound = isinstance(found, dict) and all(isinstance(v, dict) for v in found.values())
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: metadata {LAYERS!r} is not a JSON object with layers. Download it again.")
    return found
