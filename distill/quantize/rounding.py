"""Rounding a dense weight to a few bits a number, one scale and one zero a group. The other methods end here.

    round_to_nearest    a group's smallest and largest number become its first and last code
    clip                the pair of scale and zero with the smallest error, which cuts a group's outliers off

`clip` measures the error of the weight, or of what the layer puts out where rows of its input are known: for a group
of columns with inputs X that error is |X d|^2 = d H d with H = X^T X, so one G x G matrix a group is all it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..packed.weight import QuantizedWeight, pack_nibbles, to_matrix

SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
"""shares of a group's range that `clip` tries (AWQ tries down to 0.5, but for symmetric codes of whole rows)"""
REFINE = 2
"""least-squares steps after the search; the third changes the error by less than 0.1 %"""
AT_ONCE = 1 << 20
"""numbers worked on together: few enough for the processor's cache, many enough for the interpreter"""
HALF_SMALLEST = 2.0**-14
"""fp16's smallest number with all its bits"""

Norm = Callable[[Tensor], Tensor]  # an error (N, K/G, G) -> its size a group (N, K/G)
Grid = tuple[Tensor, Tensor]  # scale and zero, both (N, K/G, 1)


def round_to_nearest(weight: Tensor, bits: int, group: int) -> QuantizedWeight:
    """Dense weight (N, K) or (out, in, kh, kw) -> codes of `bits` bits, each within half a step of its number."""
    w = grouped(weight, group)
    parts = [span(part, bits) for part in row_blocks(w)]
    return encode(weight, bits, group, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def clip(weight: Tensor, bits: int, group: int, rows: Tensor | None = None) -> QuantizedWeight:
    """The scale and zero of each group that minimise the error: of the weight, or of rows (R, K) @ weight."""
    w = grouped(weight, group)
    hessian = None if rows is None else gram(rows, group)
    parts = [search(part, bits, squared if hessian is None else by(hessian), hessian) for part in row_blocks(w)]
    return encode(weight, bits, group, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def channelwise(weight: Tensor, int8_activations: bool = False) -> QuantizedWeight:
    """8 bits, one scale for each output channel, no zero."""
    w = to_matrix(weight).float()
    scale = w.abs().amax(1, keepdim=True) / 127  # (N, 1)
    scale = halves(scale.masked_fill(scale == 0, HALF_SMALLEST))
    codes = (w / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(
        codes, scale.t().contiguous(), None, tuple(weight.shape), 8, int8_activations=int8_activations
    )


# ------------------------------------------------------------------------------------------------- scale and zero


def span(w: Tensor, bits: int) -> Grid:
    """The grid from a group's smallest number to its largest. zero is what code 8 stands for."""
    low, high = w.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return scale, low + 8 * scale


def search(w: Tensor, bits: int, norm: Norm, hessian: Tensor | None) -> Grid:
    """The best of SHRINK around the middle of each group, then least squares for its codes; never worse than span."""
    scale, zero = span(w, bits)
    middle = zero + ((2**bits - 1) / 2 - 8) * scale
    best, error = (scale, zero), norm(nearest(w, scale, zero, bits)[0].sub_(w))
    for share in SHRINK[1:]:
        s = scale * share
        best, error = better(w, bits, norm, best, error, (s, middle + (8 - (2**bits - 1) / 2) * s))
    for _ in range(REFINE):
        best, error = better(w, bits, norm, best, error, least_squares(w, *best, bits, hessian))
    return best


def better(w: Tensor, bits: int, norm: Norm, best: Grid, error: Tensor, tried: Grid) -> tuple[Grid, Tensor]:
    """In each group the grid with the smaller error."""
    e = norm(nearest(w, *tried, bits)[0].sub_(w))
    wins = (e < error)[..., None]
    return tuple(torch.where(wins, t, b) for t, b in zip(tried, best)), torch.minimum(e, error)


def least_squares(w: Tensor, scale: Tensor, zero: Tensor, bits: int, hessian: Tensor | None) -> Grid:
    """The scale and zero that fit w best with its codes kept: the regression of w on the codes, weighted by H."""
    q = nearest(w, scale, zero, bits)[1].sub_(8)  # w ~ scale q + zero
    hq = q if hessian is None else times(q, hessian)
    h1 = torch.ones_like(w[:1]) if hessian is None else hessian.sum(1)[None]
    qq, q1, qw = (hq * q).sum(-1), hq.sum(-1), (hq * w).sum(-1)
    one, w1 = h1.sum(-1), (h1 * w).sum(-1)
    determinant = qq * one - q1.square()
    flat = determinant <= 1e-6 * qq * one  # all codes of the group are one
    s = (qw * one - q1 * w1) / determinant.masked_fill(flat, 1)
    s = torch.where(flat | (s <= 0), scale[..., 0], s)
    return s[..., None], ((w1 - s * q1) / one)[..., None]


def nearest(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """w rounded to the grid, and its codes (as floats)."""
    codes = round_to_codes(w, scale, zero, bits)
    return (codes - 8).mul_(scale).add_(zero), codes


def round_to_codes(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """(R, groups, G) -> codes of so many bits, by the nearest."""
    return (w - zero).div_(scale.clamp(min=1e-30)).add_(8).round_().clamp_(0, 2**bits - 1)


# ------------------------------------------------------------------------------------------------------ how far off


def squared(d: Tensor) -> Tensor:
    """Sum of squares over each group."""
    return d.square_().sum(-1)


def by(hessian: Tensor) -> Norm:
    """The size of what an error does to the layer's output, d H d."""
    return lambda d: (times(d, hessian) * d).sum(-1)


def gram(rows: Tensor, group: int) -> Tensor:
    """X^T X of each group of columns, (K/G, G, G). A hundredth of its mean diagonal keeps it honest with few rows."""
    x = rows.float().view(len(rows), -1, group).transpose(0, 1)  # (K/G, R, G)
    h = x.transpose(1, 2) @ x / len(rows)
    diagonal = h.diagonal(dim1=1, dim2=2)
    floor = 0.01 * diagonal.mean(1, keepdim=True) + 1e-6 * diagonal.mean() + 1e-30
    diagonal += floor
    return h


def times(d: Tensor, hessian: Tensor) -> Tensor:
    """d (N, K/G, G) times each group's H."""
    return (d.transpose(0, 1) @ hessian).transpose(0, 1)


# ------------------------------------------------------------------------------------------------------- the layout


def grouped(weight: Tensor, group: int) -> Tensor:
    """(N, K/G, G) in fp32."""
    w = to_matrix(weight).float()
    return w.reshape(len(w), -1, group)


def row_blocks(w: Tensor) -> Iterator[Tensor]:
    """w (N, K/G, G) in slices of about AT_ONCE numbers."""
    return iter(w.split(max(1, AT_ONCE // w[0].numel())))


def encode(weight: Tensor, bits: int, group: int, scale: Tensor, zero: Tensor) -> QuantizedWeight:
    """The codes for scale and zero (N, K/G, 1) as the file will hold them, so that their rounding is accounted for."""
    flat = scale <= 0  # a group of equal numbers: code 8 says all
    scale = scale.masked_fill(flat, HALF_SMALLEST)
    exact = (zero.abs() <= 512 * scale) | flat  # else fp16 moves the grid by more than a quarter of a step
    scale, zero = halves(scale, zero) if exact.all() else (scale, zero)
    w = grouped(weight, group)
    size = max(1, AT_ONCE // w[0].numel())
    codes = torch.cat(
        [
            pack_nibbles(round_to_codes(part, s.float(), z.float(), bits).flatten(1))
            for part, s, z in zip(w.split(size), scale.split(size), zero.split(size))
        ]
    )
    scale, zero = (t.squeeze(-1).t().contiguous() for t in (scale, zero))
    return QuantizedWeight(codes, scale, zero, tuple(weight.shape), bits)


def halves(scale: Tensor, *others: Tensor):
    """fp16 where that loses nothing that matters: scales with all their bits, nothing past 65504. Else fp32."""
    fits = scale.min() >= HALF_SMALLEST and all(t.abs().max() <= 65504 for t in (scale, *others))
    out = tuple(t.to(torch.float16 if fits else torch.float32) for t in (scale, *others))
    return out if others else out[0]
