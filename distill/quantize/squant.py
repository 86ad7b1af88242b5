"""Codes of a convolution that go by what its kernels add up to, where no inputs are known.

Neighbouring pixels are alike, so an error d that all taps of a kernel share is felt more than one that they cancel.
With taps correlated by a half, the squared error of the output is, up to a factor,

    |d|^2 + |sum of d over the taps of each kernel|^2

Rounding to the nearest minimises the first alone. Moving one code of a kernel to its other neighbour costs little of
the first and saves more of the second: SQuant (Guo et al. 2022, arXiv:2202.07471), which goes by the sums alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..packed.weight import QuantizedWeight, pack_nibbles, to_matrix, unpack_nibbles


def balanced(q: QuantizedWeight, weight: Tensor, at_once: int) -> QuantizedWeight:
    """q of 4 bits or fewer with that error made smaller: in each kernel the one code is moved by one that saves most (a
    second would save 3 % more). at_once: numbers worked on together."""
    if q.in_features == weight.shape[1]:
        return q  # each kernel is one number
    zero = torch.zeros_like(q.scale) if q.zero is None else q.zero
    rows = max(1, at_once // q.in_features)
    parts = zip(*(t.split(rows) for t in (q.codes, q.scale.t(), zero.t(), to_matrix(weight))))
    return replace(q, codes=torch.cat([_balanced(*part, 2**q.bits - 1, weight.shape[1]) for part in parts]))


def _balanced(packed: Tensor, scale: Tensor, zero: Tensor, w: Tensor, top: int, channels: int) -> Tensor:
    """packed (n, K/2), scale and zero (n, K/G), w (n, K) -> packed, with codes from 0 to top."""

    def kernels(t: Tensor) -> Tensor:  # (n, taps, channels)
        return t.float().repeat_interleave(w.shape[1] // t.shape[1], 1).view(len(w), -1, channels)

    codes, step = kernels(unpack_nibbles(packed)), kernels(scale)
    d = (codes - 8) * step + kernels(zero) - kernels(w)
    pull = d + d.sum(1, keepdim=True)  # half the error's gradient
    moved = codes - (step * pull).sign()
    saved = step.abs() * (pull.abs() - step.abs())  # half of what moving one code saves
    most, tap = saved.where(moved == moved.clamp(0, top), 0).max(1, keepdim=True)
    return pack_nibbles(codes.scatter(1, tap, torch.where(most > 0, moved, codes).gather(1, tap)).flatten(1))
