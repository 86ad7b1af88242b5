"""What computes on a quantized weight, and which way of computing is taken.

    plain       dequantize the whole weight, then torch's own operation: what every other way is measured against
    small       dequantized once and kept, for layers of less than a MB (cache.py)
    CPU float   unpack in blocks and multiply in fp32 (4-bit weights, full activations: W4A16)
    CPU int8    round the activations to 8 bits as they come and multiply integers (W4A8, W8A8)
    elsewhere   comfy-kitchen's kernel where it has one for the case, else plain in the activations' type

`activations` says which: "float" never rounds them; "int8" does wherever an integer kernel exists; "auto" does where

    - a sample has more rows than FEW (below, unpacking is all the time), and multiplications enough to pay (WORTH),
    - this machine multiplies int8 faster than fp32 (`verify.integers_are_fast`: it has VNNI),
    - the weight's rows fit int8 (`unpack.coarseness`),
    - this very input does: else the output is computed again in fp32 (`cpu.rounding_error`).

Each of these depends on the layer, the machine and the input alone, so the same seed gives the same image whatever ran
before, in whichever process, and whatever else is in its batch. Any way is refused, aloud, where it disagrees with
plain: see verify.py. torch's own int4 multiplication (`_weight_int4pack_mm_for_cpu`) is
not among them: with one row it is 7 times faster than fp32 and these ways 2 times slower, but it needs bf16 activations
(error 3e-3, past the 1e-3 that LoRA is held to) and a second copy of the codes, and rows are few in 0.1 % of a U-Net's
time.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, cuda, verify
from .cache import small_dense
from .unpack import coarseness
from .weight import QuantizedWeight

FEW = 16
"""rows"""
WORTH = 1 << 25
"""multiplications a sample: with fewer, calling torch takes longer than they do, and int8 needs more calls (measured:
as fast as fp32 from 20 million on for a Linear, 50 for a 3x3 convolution)"""
ROUNDING = 0.04
"""largest relative error of an output from its input's rounding; Gaussian inputs have 0.01. 4-bit weights err by 0.1 a
layer, and errors add as squares"""
COARSE = 0.45
"""largest `coarseness`: adds a tenth to the error of 4 bits"""
LONGEST = (1 << 31) // 128**2
"""columns that int32 sums hold for certain"""


def linear(w: QuantizedWeight, x: Tensor, bias: Tensor | None, activations: str = "auto") -> Tensor:
    """x (..., K) -> (..., N)"""
    if _plain(x):
        return F.linear(x, w.dequantize(x.dtype), bias)
    each = x.shape[-2] if x.ndim > 1 else 1
    dense = _small(w, x, each, activations)
    if dense is not None:
        return F.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu":
        rows = rows.float()
    if w.pre_quant_scale is not None:
        rows = rows * w.pre_quant_scale.to(rows.dtype)
    y = _rows(w, rows, None if bias is None else bias.to(rows.dtype), each, activations)
    if w.up is not None:
        y.addmm_(rows @ w.down.to(rows.dtype).t(), w.up.to(rows.dtype).t())
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def conv2d(
    w: QuantizedWeight, x: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int, activations="auto"
) -> Tensor:
    """x (B, C, H, W) or (C, H, W) -> (B, N, H', W'); channels-last on the CPU"""
    if x.ndim == 3:
        return conv2d(w, x[None], bias, stride, padding, dilation, groups, activations)[0]
    if _plain(x) or groups != 1 or x.device.type != "cpu":
        return F.conv2d(x, w.dequantize(x.dtype), bias, stride, padding, dilation, groups)
    image, bias = x.float(), None if bias is None else bias.float()
    dense = _small(w, x, pixels(x, stride), activations)
    if dense is not None:
        return F.conv2d(image, dense, bias, stride, padding, dilation).to(x.dtype)
    if w.pre_quant_scale is not None:
        image = image * w.pre_quant_scale.float().view(-1, 1, 1)
    pads = pads_of(padding, w.shape[2:], dilation)
    y = _pixels(w, image, bias, stride, pads, dilation, activations)
    if w.up is not None:
        image, equal = cpu.padded(image, pads)
        y += F.conv2d(F.conv2d(image, w.down.float(), None, stride, equal, dilation), w.up.float()[..., None, None])
    return y.to(x.dtype)


def _plain(x: Tensor) -> bool:
    """Nothing to compute, or a gradient to keep (the other ways write into buffers)."""
    return x.numel() == 0 or (torch.is_grad_enabled() and x.requires_grad)


def pads_of(padding: str | cpu.Pair, kernel: cpu.Pair, dilation: cpu.Pair) -> cpu.Pads:
    """Conv2d's padding -> (left, right, top, bottom); "same" puts the odd pixel last, as torch does."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        (th, tw) = (d * (k - 1) for d, k in zip(dilation, kernel))
        return (tw // 2, tw - tw // 2, th // 2, th - th // 2)
    return (padding[1], padding[1], padding[0], padding[0])


# --------------------------------------------------------------------------------------------------- the choices


def _rows(w: QuantizedWeight, x: Tensor, bias: Tensor | None, each: int, activations: str) -> Tensor:
    """x (M, K), already times pre_quant_scale, `each` rows a sample -> (M, N)"""

    def plain(w: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, w.matrix(x.dtype), bias)

    def int8(w: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        return cpu.int8_linear(w, x, bias)[0]

    if x.device.type != "cpu":
        ways = {"comfy-kitchen": cuda.linear} if cuda.applies(w, x) else {}
        found = ways and verify.way("linear", ways, plain, w, x, 1, verify.HALF)
        return (found or plain)(w, x, bias)
    if integer_weight(w, each, activations) and verify.way("linear", {"int8": int8}, plain, w, x, 1, verify.INT8):
        y, error = cpu.int8_linear(w, x, bias)
        if activations == "int8" or error <= ROUNDING:
            return y
    ways = {name: partial(cpu.float_linear, multiply=f) for name, f in cpu.multipliers().items()}
    found = verify.way("linear", ways, plain, w, x, 1, verify.FLOAT)
    return (found or plain)(w, x, bias)


def _pixels(w: QuantizedWeight, x: Tensor, bias: Tensor | None, stride, pads, dilation, activations: str) -> Tensor:
    """x (B, C, H, W), already times pre_quant_scale -> (B, N, H', W'), on the CPU"""
    geometry = (stride, pads, dilation)

    def plain(w: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = cpu.padded(x, pads)
        return F.conv2d(x, w.unrolled(w.matrix()), bias, stride, padding, dilation)

    def int8(w: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        return cpu.int8_conv(w, x, bias, *geometry)[0]

    def direct(w: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        return cpu.float_conv(w, x, bias, *geometry)

    if integer_weight(w, pixels(x, stride), activations) and verify.way(
        geometry, {"int8": int8}, plain, w, x, 1, verify.INT8
    ):
        y, error = cpu.int8_conv(w, x, bias, *geometry)
        if activations == "int8" or error <= ROUNDING:
            return y
    return (verify.way(geometry, {"float": direct}, plain, w, x, 1, verify.FLOAT) or plain)(w, x, bias)


def pixels(x: Tensor, stride: cpu.Pair) -> int:
    """Of an output image, about."""
    return x.shape[2] * x.shape[3] // (stride[0] * stride[1])


def _small(w: QuantizedWeight, x: Tensor, rows: int, activations: str) -> Tensor | None:
    """The dense weight of a layer too small for anything else to pay."""
    if x.device.type != "cpu" or activations == "int8" or rows * w.out_features * w.in_features >= WORTH:
        return None
    return small_dense(w)


def integer_weight(w: QuantizedWeight, rows: int, activations: str) -> bool:
    """Whether integers are wanted for this layer and `rows` a sample, whatever the numbers it is given."""
    if activations == "float" or w.codebook is not None or w.in_features > LONGEST:
        return False
    if activations == "int8":
        return True
    if rows <= FEW or rows * w.out_features * w.in_features < WORTH or not verify.integers_are_fast():
        return False
    return coarseness(w) <= COARSE
