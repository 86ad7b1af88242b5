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

from ...header import CheckpointError
from ..weight import FORMATS, MARK, QuantError, QuantizedWeight, layers, read_mark, to_bytes

STOCK = (
    *("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"),
    *("int8_blockwise", "svdquant_w4a4"),
)
"""formats of comfy_quant that ComfyUI's own operations take, this version's or a newer one's"""
LAYERS = "_quantization_metadata"
"""where a file keeps its marks in the metadata instead: {"layers": {name: {"format": ...}}}"""
OLD = "scaled_fp8"
"""of 2025's fp8 files: one empty tensor for all, and `L.scale_weight`, `L.scale_input` beside a weight"""


def check(path: Path, weights: dict[str, Tensor], metadata: Mapping[str, str], stock: Collection[str]) -> str:
    """Check every marked layer; returns the file's kind. Adds marks that stand in the metadata or are of 2025."""
    for name, spec in _marks_in_metadata(path, metadata).items():
        _add_mark(weights, name, spec)
    old = [k for k in weights if k == OLD or k.endswith(f".{OLD}")]
    for marker in old:
        _new_names(weights, marker)
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
    if old:
        return "scaled_fp8"
    if marked:
        return "comfy_quant"
    return "dense"


def _add_mark(weights: dict[str, Tensor], name: str, spec: dict[str, Any]) -> None:
    if f"{name}.weight" in weights:
        weights.setdefault(f"{name}.{MARK}", to_bytes(spec))


def _new_names(weights: dict[str, Tensor], marker: str) -> None:
    """2025's fp8 layers under `marker`'s prefix get today's names and marks, as ComfyUI's convert_old_quants does."""
    prefix, whole = marker.removesuffix(OLD), weights.pop(marker).numel() == 2
    for key in [k for k in weights if k.startswith(prefix) and k.endswith((".scale_weight", ".scale_input"))]:
        value = weights.pop(key)
        layer, _, last = key.rpartition(".")
        if last == "scale_weight":
            weight = weights.get(f"{layer}.weight")
            kind = "float8_e5m2" if weight is not None and weight.dtype == torch.float8_e5m2 else "float8_e4m3fn"
            weights[f"{layer}.weight_scale"] = value
            _add_mark(weights, layer, {"format": kind} | ({"full_precision_matrix_mult": True} if whole else {}))
        elif value.numel() != 1 or value.float().item() != 1:
            weights[f"{layer}.input_scale"] = value


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
