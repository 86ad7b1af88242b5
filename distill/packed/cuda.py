"""comfy-kitchen's 4-bit kernel (CUDA, ROCm) where it is installed and made for the case. Through its public function.

With many rows its function dequantizes the whole weight too, by way of int32: more memory than plain takes.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .weight import QuantizedWeight

ROWS = 256
"""above, multiplying is all the time and plain dequantization as good (not measured here: no GPU was at hand)"""


@functools.cache
def module() -> ModuleType | None:
    """comfy-kitchen, where it is installed and new enough; else None."""
    try:
        import comfy_kitchen
    except ImportError:
        return None
    return comfy_kitchen if hasattr(comfy_kitchen, "gemv_awq_w4a16") else None


def applies(w: QuantizedWeight, x: Tensor) -> bool:
    """x (M, K). Nibbles with scale and zero, 16-bit activations, few rows, on a device that its kernels run on."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float16, torch.bfloat16)
        and len(x) <= ROWS
        and w.bits != 8
        and w.codebook is None
        and module() is not None
    )


def linear(w: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N) in x's type; it computes in the type of the scales, so they take that of x."""
    scale = w.scale.to(x.dtype)
    zero = torch.zeros_like(scale) if w.zero is None else w.zero.to(x.dtype)
    return module().gemv_awq_w4a16(x, w.codes.contiguous(), scale, zero, bias, w.group_size)
