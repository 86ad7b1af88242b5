"""W8A8: weights and activations in 8 bits, made even first (SmoothQuant, Xiao et al. 2022, eq. 4).

Activations have a few large channels, weights have none: dividing the inputs by s = max|x|^alpha / max|w|^(1 - alpha)
and multiplying the weights by it moves part of the difficulty over. One scale a row of the weight; activations are
rounded as they come, with one scale a row (Linear) or one for all (Conv2d).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

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
    """W diag(s), rounded to 8 bits, with 1/s stored."""
    peak = peak_of(stats)
    largest = weight.float().abs().transpose(0, 1).flatten(1).amax(1)  # (in,)
    s = _floor(peak) ** alpha / _floor(largest) ** (1 - alpha)
    s = s / (s.max() * s.min()).sqrt()
    pre = (1 / s).half()
    return replace(channelwise(scale_input(weight, 1 / pre.float()), int8_activations=True), pre_quant_scale=pre)


def w8a8_error(q: QuantizedWeight, weight: Tensor, stats: LayerStats) -> float:
    """Mean square error of the output on the rows, with the activations rounded too."""
    x, dense = stats.rows, to_matrix(weight).float()
    pre = q.pre_quant_scale.float() if q.pre_quant_scale is not None else torch.ones(stats.channels)
    rounded = x * taps(pre, weight)
    if weight.ndim == 4:
        step = (peak_of(stats) * pre).max() / 127
    else:
        step = rounded.abs().amax(1, keepdim=True) / 127
    rounded = (rounded / step.clamp(min=1e-30)).round_().clamp_(-127, 127) * step
    return (rounded @ q.matrix().t() - x @ dense.t()).square_().mean().item()


def peak_of(stats: LayerStats) -> Tensor:
    """Largest |x| of each input channel."""
    if stats.peak is not None:
        return stats.peak
    return stats.rows.view(len(stats.rows), -1, stats.channels).abs().amax((0, 1))


def _floor(t: Tensor) -> Tensor:
    return t.clamp(min=1e-4 * t.max().clamp(min=1e-30))
