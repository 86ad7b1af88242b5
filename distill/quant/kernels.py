"""What computes on a quantized weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .weight import QuantizedWeight


def linear(w: QuantizedWeight, x: Tensor, bias: Tensor | None, activations: str = "auto") -> Tensor:
    """x (..., K) -> (..., N)"""
    return F.linear(x, w.dequantize(x.dtype), bias)


def conv2d(
    w: QuantizedWeight, x: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int, activations="auto"
) -> Tensor:
    """x (B, C, H, W) -> (B, N, H', W')"""
    return F.conv2d(x, w.dequantize(x.dtype), bias, stride, padding, dilation, groups)
