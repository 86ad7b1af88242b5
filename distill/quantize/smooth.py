"""W8A8: weights and activations in 8 bits, made even first (SmoothQuant, Xiao et al. 2022, eq. 4).

Activations have a few large channels, weights have none: dividing the inputs by s = max|x|^alpha / max|w|^(1 - alpha)
and multiplying the weights by it moves part of the difficulty over. One scale a row of the weight; activations are
rounded as they come, each row (Linear) or image (Conv2d) on a grid of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..packed import cpu
from ..packed.weight import QuantizedWeight, to_matrix
from .awq import scale_input, taps
from .calibrate import LayerStats
from .rounding import channelwise

ALPHAS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75)
"""tried where none is given; the paper's is 0.5, 0.75 for its hardest model (section 5.1). None of them is an option
too: no smoothing at all"""


def smoothquant(weight: Tensor, stats: LayerStats | None, alpha: float | None = None) -> QuantizedWeight:
    """One layer for W8A8 at a fixed alpha, or at the one with the least output error. Without stats: unsmoothed."""
    plain = channelwise(weight, int8_activations=True)
    if stats is None:
        return plain
    tried = [smoothed(weight, stats, a) for a in (ALPHAS if alpha is None else (alpha,))]
    if alpha is not None:
        return tried[0]
    return min([plain, *tried], key=lambda q: w8a8_error(q, weight, stats))


def smoothed(weight: Tensor, stats: LayerStats, alpha: float) -> QuantizedWeight:
    """W8A8 with the paper's s (in,), kept as pre_quant_scale = 1/s in fp16."""
    largest = weight.float().abs().transpose(0, 1).flatten(1).amax(1)  # (in,)
    s = _floor(stats.peak) ** alpha / _floor(largest) ** (1 - alpha)
    s = s / (s.max() * s.min()).sqrt()
    pre = (1 / s).half()
    return replace(channelwise(scale_input(weight, 1 / pre.float()), int8_activations=True), pre_quant_scale=pre)


def w8a8_error(q: QuantizedWeight, weight: Tensor, stats: LayerStats) -> float:
    """Mean square error of the output on the rows, with the activations rounded too, by `packed.cpu`'s rules. A
    convolution's images each have their own range there; here it is that of all together, which is no smaller."""
    x, dense = stats.rows, to_matrix(weight).float()
    pre = q.pre_quant_scale.float() if q.pre_quant_scale is not None else torch.ones(len(stats.mean))
    scaled = x * taps(pre, weight)
    if weight.ndim == 4:
        low, high = stats.range
        zero, step = cpu.grid((low * pre).min(), (high * pre).max())
        codes = torch.empty(scaled.shape, dtype=torch.int8)
        cpu.round_into(codes, scaled, 1 / step, zero)
    else:
        zero, (codes, step) = 0, cpu.round_rows(scaled)
    return (((codes - zero) * step) @ q.matrix().t() - x @ dense.t()).square_().mean().item()


def _floor(t: Tensor) -> Tensor:
    return t.clamp(min=1e-4 * t.max().clamp(min=1e-30))
