"""From packed codes to numbers a matrix multiplication takes, on the CPU, a block that fits the cache at a time.

Eager torch runs one operation after the other over memory. So codes are unpacked in blocks, in place, into buffers that
the thread keeps: about 0.4 ns a weight, where unpacking whole tensors takes 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .buffers import scratch
from .cache import remembered
from .weight import QuantizedWeight

BLOCK = 1 << 20
"""weights unpacked at once: a few MB of buffers. A quarter of it costs a fifth more, in calls of torch"""
HALF_STEP = 128
"""0.5 in the 8.8 fixed point of `integer`"""


def nibbles(codes: Tensor) -> Tensor:
    """(n, K/2) packed -> (n, K) int8 of 0..15, low nibble first. Scratch."""
    wide = scratch("wide", tuple(codes.shape), torch.int16)
    high = scratch("high", tuple(codes.shape), torch.int16)
    wide.copy_(codes.view(torch.uint8))  # 0x00hl
    torch.bitwise_left_shift(wide, 4, out=high)  # 0x0hl0
    wide.bitwise_or_(high).bitwise_and_(0x0F0F)  # 0x0h0l: bytes l, h in memory
    return wide.view(torch.int8)


def codes_of(w: QuantizedWeight, i: int, j: int) -> Tensor:
    """Rows i..j of the codes, (j - i, K) int8: 0..15, or -128..127 where bits is 8."""
    return w.codes[i:j] if w.bits == 8 else nibbles(w.codes[i:j])


def dense(w: QuantizedWeight, i: int, j: int, out: Tensor) -> Tensor:
    """Rows i..j of `w.matrix()` into out (j - i, K) fp32."""
    scale, low = affine(w)
    rows = max(1, BLOCK // w.in_features)
    for a in range(i, j, rows):
        b = min(j, a + rows)
        part, codes = out[a - i : b - i], codes_of(w, a, b)
        if w.codebook is None:
            part.copy_(codes)
        else:
            index = scratch("index", tuple(codes.shape), torch.int32).copy_(codes)
            torch.index_select(w.codebook.float(), 0, index.flatten(), out=part.flatten())
        grouped = part.view(b - a, -1, w.group_size)
        grouped.mul_(scale[a:b])
        if low is not None:
            grouped.add_(low[a:b])
    return out


def affine(w: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """scale, and what code 0 stands for: both (N, K/G, 1) fp32, low None where it is 0."""
    scale = w.scale.float()
    low = None if w.zero is None else w.zero.float()
    if w.bits != 8 and w.codebook is None:
        low = scale * -8 if low is None else low - 8 * scale
    return scale.t().unsqueeze(-1), None if low is None else low.t().unsqueeze(-1)


def integer(w: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """W ~ w8.t() * step[:, None] with w8 (K, N) int8 (scratch, or the codes themselves) and step (N,) fp32; W is
    w.matrix(), its columns over (kh, kw, in) even where w is flat.

    Each row's largest number becomes 127. Codes turn into these by 8.8 fixed-point arithmetic in int16, exact to half
    a step: `code * (256 scale / step) + (256 low / step)`, rounded by a shift. Not for codebooks.
    """
    if w.bits == 8 and w.zero is None and w.group_size == w.in_features and not w.flat:
        return w.codes.t(), w.scale[0].float()
    step = row_step(w)
    fine = 256 / step
    scale = w.scale * fine  # (K/G, N)
    low = scale * (0 if w.bits == 8 else -8)
    low = low if w.zero is None else low.addcmul_(w.zero.float(), fine)
    s, z = scale.round_().to(torch.int16), low.add_(HALF_STEP).round_().to(torch.int16)
    return fixed_point(w, s.t().unsqueeze(-1), z.t().unsqueeze(-1)), step


def fixed_point(w: QuantizedWeight, s: Tensor, z: Tensor) -> Tensor:
    """(K, N) int8, columns in one piece: code * s + z in 8.8 fixed point, s and z (N, K/G, 1) int16."""
    n, k = w.out_features, w.in_features
    out, rows = scratch("w8", (n, k), torch.int8), max(1, BLOCK // k)
    taps = math.prod(w.shape[2:]) if w.flat else 1
    for a in range(0, n, rows):
        b = min(n, a + rows)
        fixed = scratch("fixed", (b - a, k // w.group_size, w.group_size), torch.int16)
        fixed.view(b - a, k).copy_(codes_of(w, a, b))
        fixed.mul_(s[a:b]).add_(z[a:b]).bitwise_right_shift_(8)
        out[a:b].view(b - a, taps, -1).copy_(fixed.view(b - a, -1, taps).transpose(1, 2))
    return out.t()


def row_step(w: QuantizedWeight) -> Tensor:
    """(N,) fp32: what 1 of 127 stands for, from the first and last code of each group."""
    first, last = (-128, 127) if w.bits == 8 else (-8, 2**w.bits - 9)
    scale, zero = w.scale.float(), 0 if w.zero is None else w.zero.float()
    top = torch.maximum((zero + first * scale).abs_(), (zero + last * scale).abs_()).amax(0)
    return top.div_(127).clamp_(min=1e-30)


@remembered
def coarseness(w: QuantizedWeight) -> float:
    """The int8 grid's rounding error over that of 4 bits in the same groups, as root mean squares.

    Far below 1 unless single groups of a row dwarf the others: 0.09 for Gaussian weights in groups of 64.
    """
    if w.bits == 8 and w.group_size == w.in_features:
        return 0.0
    step4 = w.scale.float() * ((2**w.bits - 1) / 15)
    return (row_step(w).square_().mean() / step4.square_().mean().clamp_(min=1e-38)).sqrt_().item()


@remembered
def norm(w: QuantizedWeight) -> float:
    """L2 norm of w.matrix()."""
    n, rows = w.out_features, max(1, BLOCK // w.in_features)
    part = scratch("dense", (min(n, rows), w.in_features), torch.float32)
    cuts = [(i, min(n, i + rows)) for i in range(0, n, rows)]
    return sum(dense(w, i, j, part[: j - i]).square_().sum(dtype=torch.float64).item() for i, j in cuts) ** 0.5
