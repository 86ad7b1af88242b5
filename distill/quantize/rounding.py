"""Rounding a dense weight to a few bits a number, one scale (and one zero) a group. The other methods end here.

    round_to_nearest    a group's smallest and largest number become its first and last code
    clip                the grid with the smallest error, which cuts a group's outliers off

`clip` measures the error of the weight, or of what the layer puts out where rows of its input are known: for a group
of columns with inputs X that error is |X d|^2 = d H d with H = X^T X, so one G x G matrix a group is all it needs.

At 4 bits it tries two grids of equal size: scale and zero for each G numbers, or, as ggml's Q4_0, a scale alone for
each G / 2, whose sign makes the number of largest size code 0, the -8 of -8..7. Which of the two has the smaller error
differs from layer to layer, so both are tried; benchmarks/four_bit_against_q4_0.py measures what that gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..packed.weight import QuantizedWeight, pack_nibbles, to_matrix
from . import squant

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
    """The grids that minimise the error of the weight, or of rows (R, K) @ weight; the better of two of equal size.
    Without rows, a convolution's codes are then balanced (squant.py)."""
    found = [fitted(weight, bits, group, rows)]
    if bits == 4 and group % 4 == 0 and group >= 32:
        found.append(fitted(weight, bits, group // 2, rows, signed=True))
    best = min(found, key=lambda q: misfit(q, weight, rows))
    return squant.balanced(best, weight, AT_ONCE) if rows is None else best


def fitted(weight: Tensor, bits: int, group: int, rows: Tensor | None, signed: bool = False) -> QuantizedWeight:
    """The best grid of each group: scale and zero, or a scale of any sign alone."""
    w = grouped(weight, group)
    hessian = None if rows is None else gram(rows, group)
    norm = squared if hessian is None else by(hessian)
    parts = [search(part, bits, norm, hessian, signed) for part in row_blocks(w)]
    scale, zero = (torch.cat(some) for some in zip(*parts))
    return encode(weight, bits, group, scale, None if signed else zero)


def misfit(q: QuantizedWeight, weight: Tensor, rows: Tensor | None) -> float:
    """Sum of squares of what is wrong with the weight, or with rows @ weight."""
    d = q.matrix().sub_(to_matrix(weight))
    return (d if rows is None else rows.float() @ d.t()).square_().sum().item()


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


def signed_span(w: Tensor) -> Grid:
    """The grid without a zero on which a group's number of largest size is code 0 (ggml's quantize_row_q4_0_ref)."""
    top = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    return top / -8, torch.zeros_like(top)


def search(w: Tensor, bits: int, norm: Norm, hessian: Tensor | None, signed: bool = False) -> Grid:
    """The best of SHRINK around the middle of each group (0 where signed), then least squares for its codes; never
    worse than span, or signed_span."""
    scale, zero = signed_span(w) if signed else span(w, bits)
    center = 8 if signed else (2**bits - 1) / 2  # the code that stays where it is while the grid shrinks
    middle = zero + (center - 8) * scale
    best, error = (scale, zero), norm(nearest(w, scale, zero, bits)[0].sub_(w))
    for share in SHRINK[1:]:
        s = scale * share
        best, error = better(w, bits, norm, best, error, (s, middle + (8 - center) * s))
    for _ in range(REFINE):
        best, error = better(w, bits, norm, best, error, least_squares(w, *best, bits, hessian, signed))
    return best


def better(w: Tensor, bits: int, norm: Norm, best: Grid, error: Tensor, tried: Grid) -> tuple[Grid, Tensor]:
    """In each group the grid with the smaller error."""
    e = norm(nearest(w, *tried, bits)[0].sub_(w))
    wins = (e < error)[..., None]
    return tuple(torch.where(wins, t, b) for t, b in zip(tried, best)), torch.minimum(e, error)


def least_squares(
    w: Tensor, scale: Tensor, zero: Tensor, bits: int, hessian: Tensor | None, signed: bool = False
) -> Grid:
    """The grid that fits w best with its codes kept: the regression of w on the codes, weighted by H; without a
    constant where signed."""
    q = nearest(w, scale, zero, bits)[1].sub_(8)  # w ~ scale q + zero
    hq = q if hessian is None else times(q, hessian)
    if signed:
        qq = (hq * q).sum(-1, keepdim=True)
        return torch.where(qq > 0, (hq * w).sum(-1, keepdim=True) / qq, scale), zero
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
    return (w - zero).div_(scale.where(scale != 0, 1e-30)).add_(8).round_().clamp_(0, 2**bits - 1)


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


def encode(weight: Tensor, bits: int, group: int, scale: Tensor, zero: Tensor | None) -> QuantizedWeight:
    """The codes for scale and zero (N, K/G, 1) as the file will hold them, so that their rounding is accounted for."""
    flat = scale == 0  # a group of equal numbers: code 8 says all
    scale = scale.masked_fill(flat, HALF_SMALLEST)
    if zero is None:
        scale = halves(scale)
    elif ((zero.abs() <= 512 * scale) | flat).all():  # else fp16 moves the grid by more than a quarter of a step
        scale, zero = halves(scale, zero)
    w = grouped(weight, group)
    size = max(1, AT_ONCE // w[0].numel())
    zeros = torch.zeros_like(scale) if zero is None else zero
    codes = torch.cat(
        [
            pack_nibbles(round_to_codes(part, s.float(), z.float(), bits).flatten(1))
            for part, s, z in zip(w.split(size), scale.split(size), zeros.split(size))
        ]
    )
    scale, zero = (None if t is None else t.squeeze(-1).t().contiguous() for t in (scale, zero))
    return QuantizedWeight(codes, scale, zero, tuple(weight.shape), bits)


def halves(scale: Tensor, *others: Tensor):
    """fp16 where that loses nothing that matters: scales with all their bits, nothing past 65504. Else fp32."""
    fits = scale.abs().min() >= HALF_SMALLEST and all(t.abs().max() <= 65504 for t in (scale, *others))
    out = tuple(t.to(torch.float16 if fits else torch.float32) for t in (scale, *others))
    return out if others else out[0]
