"""AWQ: weights that meet large activations are rounded finer (Lin et al. 2023, section 3.2).

Input channels are multiplied by s = mean|x|^alpha before rounding and divided by it after: a channel that matters gets
a larger share of its group's grid. alpha is searched for the least error of the layer's output; then the groups are
clipped (section 3.2, "we also apply weight clipping"). The division is stored as pre_quant_scale = 1/s.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..packed.weight import QuantizedWeight, to_matrix
from .calibrate import LayerStats, output_error
from .rounding import clip, round_to_nearest

GRID = 20
"""values of alpha in [0, 1) (the authors' code, auto_scale.py)"""


def scale_search(weight: Tensor, stats: LayerStats, bits: int, group: int) -> QuantizedWeight:
    """AWQ without clipping. alpha = 0 is plain rounding, so the output error is never above that of rounding."""
    return round_scaled(weight, best_scale(weight, stats, bits, group), bits, group)


def awq(weight: Tensor, stats: LayerStats, bits: int, group: int) -> QuantizedWeight:
    """AWQ with clipping by output error. Where clipping alone is better on the rows, that is the answer."""
    s = best_scale(weight, stats, bits, group)
    rows = stats.rows * taps(1 / s, weight)
    scaled = clip(scale_input(weight, s), bits, group, rows)
    plain = clip(weight, bits, group, stats.rows)
    found = replace(scaled, pre_quant_scale=(1 / s).half()) if not (s == 1).all() else plain
    return min(found, plain, key=lambda q: weight_error(q, weight, stats))


def best_scale(weight: Tensor, stats: LayerStats, bits: int, group: int) -> Tensor:
    """s (in,), among GRID powers of the channels' mean size."""
    powers = [scale_of(stats.mean, i / GRID) for i in range(GRID)]
    errors = [weight_error(round_scaled(weight, s, bits, group), weight, stats) for s in powers]
    return powers[min(range(GRID), key=errors.__getitem__)]


def scale_of(mean: Tensor, alpha: float) -> Tensor:
    """mean^alpha, centred at 1 and such that 1/s is exact in fp16 (so is s = 1 where alpha is 0)."""
    s = mean.clamp(min=1e-4 * mean.max().clamp(min=1e-30)) ** alpha
    s = s / (s.max() * s.min()).sqrt()
    return 1 / (1 / s).half().float()


def round_scaled(weight: Tensor, s: Tensor, bits: int, group: int) -> QuantizedWeight:
    """W diag(s), rounded to the nearest code, with 1/s stored."""
    q = round_to_nearest(scale_input(weight, s), bits, group)
    return q if (s == 1).all() else replace(q, pre_quant_scale=(1 / s).half())


def weight_error(q: QuantizedWeight, weight: Tensor, stats: LayerStats) -> float:
    """Squared error of the layer's output on the rows that calibration kept."""
    return output_error(to_matrix(q.dequantize() - weight), stats.rows)


def scale_input(weight: Tensor, s: Tensor) -> Tensor:
    """The weight with its input channels multiplied by s (in,)."""
    return weight.float() * s.view(-1, *[1] * (weight.ndim - 2))


def taps(s: Tensor, weight: Tensor) -> Tensor:
    """A number per input channel -> one per column of the weight's matrix."""
    return s.repeat(weight[0, 0].numel())
