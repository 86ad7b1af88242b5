"""bitsandbytes' 4-bit checkpoints (NF4, FP4) -> layers with a codebook, number for number.

A weight is flat: two codes a byte, the first in the high nibble, a scale (absmax) for every `blocksize` of them. With
double quantization the scales are bytes themselves: absmax = map[byte] * nested_absmax[block of 256] + offset. The
numbers beside the weight are JSON in a tensor of bytes (bitsandbytes' QuantState.as_dict(packed=True)).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...header import CheckpointError
from ..weight import from_bytes
from .ggml import Groups
from .regroup import Told, entries

STATE = ".quant_state.bitsandbytes__"
EXTRA = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def convert(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole state dict with its 4-bit layers in contract form. Raises CheckpointError naming file and layer."""
    states = {k.partition(STATE)[0]: k for k in weights if STATE in k}
    converted, told = {}, Told()
    used = {f"{key}.{e}" for key in states for e in EXTRA} | set(states.values())
    for key, value in weights.items():
        if key in states:
            groups, shape = _groups(path, key, weights, states[key])
            converted |= entries(key, shape, groups, told)
        elif key not in used:
            converted[key] = value
    for key in states.keys() - weights.keys():
        raise _broken(path, key, "it has a quant_state and no weight")
    told.say(path)
    return converted


def _groups(path: Path, key: str, weights: dict[str, Tensor], state: str) -> tuple[Groups, tuple[int, ...]]:
    spec = _spec(path, key, weights[state])
    shape, block = tuple(spec["shape"]), spec["blocksize"]
    packed = weights[key].contiguous().flatten().view(torch.uint8)
    count = math.prod(shape)
    if 2 * packed.numel() != count or count % block:
        raise _broken(path, key, f"{packed.numel()} bytes and blocks of {block} for a shape of {shape}")
    book = weights.get(f"{key}.quant_map")
    if book is None or book.shape != (16,) or not book.is_floating_point():
        raise _broken(path, key, "its quant_map is not 16 numbers")
    scale = _scales(path, key, weights, spec)
    if scale.shape != (count // block,):
        raise _broken(path, key, f"{tuple(scale.shape)} scales for {count // block} blocks")
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1, block)
    return Groups(codes, scale.view(-1, 1), None, 4, book.float()), shape


def _spec(path: Path, key: str, state: Tensor) -> dict[str, Any]:
    spec = from_bytes(state)
    if spec is None:
        raise _broken(path, key, "its quant_state is not JSON")
    shape, block = spec.get("shape"), spec.get("blocksize")
    sound = isinstance(shape, list) and 0 < len(shape) <= 5 and all(type(s) is int and 0 < s < 1 << 31 for s in shape)
    if not sound or math.prod(shape) >= 1 << 31:
        raise _broken(path, key, f"its shape is {shape!r}")
    if type(block) is not int or not 16 <= block <= 1 << 16:
        raise _broken(path, key, f"its blocksize is {block!r}")
    return spec


def _scales(path: Path, key: str, weights: dict[str, Tensor], spec: dict[str, Any]) -> Tensor:
    """fp32, one a block."""
    absmax = weights.get(f"{key}.absmax")
    if absmax is None:
        raise _broken(path, key, "its absmax is missing")
    if absmax.is_floating_point():
        return absmax.float().flatten()
    outer, table = weights.get(f"{key}.nested_absmax"), weights.get(f"{key}.nested_quant_map")
    block, offset = spec.get("nested_blocksize", 256), spec.get("nested_offset", 0.0)
    if outer is None or table is None or table.shape != (256,) or absmax.dtype != torch.uint8:
        raise _broken(path, key, "its nested scales are incomplete")
    if type(block) is not int or block < 1 or not isinstance(offset, int | float) or not abs(offset) < 1e38:
        raise _broken(path, key, f"its nested_blocksize is {block!r} and nested_offset {offset!r}")
    if outer.numel() != -(-absmax.numel() // block):
        raise _broken(path, key, f"{outer.numel()} nested scales for {absmax.numel()} scales in blocks of {block}")
    wide = outer.float().flatten().repeat_interleave(min(block, absmax.numel()))[: absmax.numel()]
    return table.float()[absmax.long().flatten()] * wide + offset


def _broken(path: Path, key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: 4-bit layer {key}: {problem}. Download the file again.")
