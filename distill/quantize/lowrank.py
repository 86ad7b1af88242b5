"""A low-rank branch beside the codes takes what they cannot (SVDQuant, Li et al. 2024, section 4).

The input channels are smoothed as in AWQ, so that W' = W diag(s) meets even inputs; the largest singular directions of
W' go into the branch U D, kept in fp16, and W' - U D is rounded. As in LoftQ (Li et al. 2023, algorithm 1) the branch
is then fitted again to what rounding left over, and stays so where that is better. Singular values are those of the
columns weighted by the size of their inputs, where it is known (LQER, Zhang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from ..packed.weight import QuantizedWeight, from_matrix, narrowed, to_matrix
from .awq import scale_input, scale_of, taps
from .calibrate import LayerStats, output_error
from .rounding import clip

ALPHAS = (0.0, 0.25, 0.5, 0.75)
"""of the smoothing; SVDQuant searches it too"""
ROUNDS = 3
"""of fitting the branch to what rounding left (LoftQ uses 1 to 5)"""


def svd(
    weight: Tensor, bits: int, group: int, rank: int, stats: LayerStats | None = None, seed: int = 0
) -> QuantizedWeight:
    """Codes and a branch of `rank`. Without stats nothing is smoothed and the weight's own error counts."""
    generator = Generator().manual_seed(seed)
    if stats is None:
        error = lambda d: d.square().mean().item()  # noqa: E731
        return _branch(weight, bits, group, rank, torch.ones(weight.shape[1]), None, error, generator)[1]

    def error(d: Tensor) -> float:
        return output_error(d, stats.rows)

    found = []
    for alpha in ALPHAS:
        s = scale_of(stats.mean, alpha)
        found.append(_branch(weight, bits, group, rank, s, stats.rows, error, generator))
    return min(found, key=lambda f: f[0])[1]


def _branch(
    weight: Tensor, bits: int, group: int, rank: int, s: Tensor, rows: Tensor | None,
    error: Callable[[Tensor], float], generator: Generator,
) -> tuple[float, QuantizedWeight]:  # fmt: skip
    """The best of ROUNDS fits at one smoothing s (in,), with its error."""
    dense, w = to_matrix(weight).float(), to_matrix(scale_input(weight, s))
    rows = None if rows is None else rows * taps(1 / s, weight)
    size = torch.ones(w.shape[1]) if rows is None else rows.square().mean(0).sqrt().clamp(min=1e-6)
    rest, found = w, []
    for _ in range(ROUNDS):
        up, down = factors(rest * size, rank, generator)
        up, down = narrowed(up), narrowed(down / size)
        branch = up.float() @ down.float()
        q = clip(from_matrix(w - branch, tuple(weight.shape)), bits, group, rows)
        coded = q.matrix()
        found.append((error((coded + branch) / taps(s, weight) - dense), q, up, down))
        rest = w - coded
    e, q, up, down = min(found, key=lambda f: f[0])
    down = from_matrix(down, (rank, *weight.shape[1:])).contiguous()
    pre = None if (s == 1).all() else (1 / s).half()
    return e, replace(q, up=up, down=down, pre_quant_scale=pre)


def factors(w: Tensor, rank: int, generator: Generator, oversample: int = 8, steps: int = 2) -> tuple[Tensor, Tensor]:
    """(N, R), (R, K) with the product nearest to w (Halko et al. 2011, algorithms 4.4 and 5.1); exact at full rank."""
    n, k = w.shape
    width = min(rank + oversample, n, k)
    y = w @ torch.randn(k, width, generator=generator)
    for _ in range(steps):
        y = w @ torch.linalg.qr(w.t() @ torch.linalg.qr(y).Q).Q
    basis = torch.linalg.qr(y).Q  # (N, width)
    u, s, v = torch.linalg.svd(basis.t() @ w, full_matrices=False)
    root = s[:rank].sqrt()
    return basis @ u[:, :rank] * root, root[:, None] * v[:rank]
