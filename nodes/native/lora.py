"""What ComfyUI's weight patches mean for a layer that stays quantized.

A plain LoRA is a low-rank branch beside the layer: y + up(down(x)), exactly what patching the dense weight would give,
and it needs no dense weight. Everything else (LoHa, LoKr, DoRA, differences, merged models) is computed on the
dequantized weight, for the length of one call.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """y[rows] += up(down(x[columns])), the strength and alpha already in `up`."""

    down: Tensor
    """(R, in) or (R, in, kh, kw)"""
    up: Tensor
    """(N, R)"""
    rows: slice
    columns: slice

    def to(self, device: torch.device, dtype: torch.dtype) -> Branch:
        return Branch(self.down.to(device, dtype), self.up.to(device, dtype), self.rows, self.columns)

    def linear(self, x: Tensor, y: Tensor) -> None:
        y[..., self.rows] += F.linear(F.linear(x[..., self.columns], self.down), self.up)

    def conv(self, x: Tensor, y: Tensor, **geometry) -> None:
        """geometry: stride, padding and dilation of the layer."""
        small = F.conv2d(x[:, self.columns], self.down, **geometry)  # (B, R, h, w)
        y[:, self.rows] += F.conv2d(small, self.up[:, :, None, None])


def branches(patches: list[tuple], shape: tuple[int, ...], key: str) -> list[Branch]:
    """ComfyUI's patches of one weight, all of them low-rank -> branches."""
    found = []
    for strength, patch, _, offset, _ in patches:
        rows, columns, target = slice(None), slice(None), list(shape)
        if offset is not None:
            dim, start, length = offset
            target[dim], cut = length, slice(start, start + length)
            rows, columns = (cut, columns) if dim == 0 else (rows, cut)
        up, down = factors(patch)
        if up.shape[0] != target[0] or down[0].numel() != torch.Size(target[1:]).numel():
            logging.error(f"LoRA for {key} left out: {tuple(up.shape)} x {tuple(down.shape)} is not {tuple(target)}")
            continue
        alpha = 1.0 if patch.weights[2] is None else patch.weights[2] / patch.weights[1].shape[0]
        if strength * alpha != 0:
            found.append(Branch(down.reshape(-1, *target[1:]), up * (strength * alpha), rows, columns))
    return stack(found)


def are_low_rank(patches: list[tuple]) -> bool:
    """Plain LoRA, all of them: no DoRA scale, no other shape, no function, none of the weight taken away."""
    return all(
        type(patch) is LoRAAdapter
        and patch.weights[4] is None
        and patch.weights[5] is None
        and strength_model == 1.0
        and function is None
        and (offset is None or offset[0] in (0, 1))
        for _, patch, strength_model, offset, function in patches
    )


def factors(patch: LoRAAdapter) -> tuple[Tensor, Tensor]:
    """(N, R), (R, in...) in fp32; LoCon's middle convolution goes into the second."""
    up, down, mid = (None if patch.weights[i] is None else patch.weights[i].float() for i in (0, 1, 3))
    if mid is not None:  # (R', R, kh, kw)
        down = torch.einsum("ri,srhw->sihw", down.flatten(1), mid)
    return up.flatten(1), down


def stack(found: list[Branch]) -> list[Branch]:
    """Branches over the same rows and columns as one: two LoRAs of rank 8 are one of rank 16."""
    groups: dict[tuple, list[Branch]] = {}
    for b in found:
        groups.setdefault((b.rows.start, b.rows.stop, b.columns.start, b.columns.stop), []).append(b)
    return [
        Branch(torch.cat([b.down for b in g]), torch.cat([b.up for b in g], 1), g[0].rows, g[0].columns)
        for g in groups.values()
    ]
