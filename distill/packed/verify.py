"""Which way of computing is right and fast here: tried once for each shape, device and number of rows, then remembered.

A way is tried on random numbers, not on what it is called with, so that what one image needed never decides how the
next one is computed. It is compared with plain dequantization on some output channels. One that disagrees, or fails,
is refused with a warning and plain is used: torch 2.13's compiled bf16 multiplication, to name one, is wrong at some
shapes. Of several right ones (which all give the same numbers to FLOAT) the fastest is taken.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .weight import QuantizedWeight

log = logging.getLogger(__name__)

Way = Callable[[QuantizedWeight, Tensor, Tensor | None], Tensor]  # weight, x, bias -> y; no low-rank branch, no scale
FLOAT, HALF, INT8 = 1e-4, 2e-2, 5e-2
"""largest relative L2 error on Gaussian input: fp32 sums in another order (1e-6 seen), 16-bit ones (3e-3), activations
and weights rounded to 8 bits (0.01)"""
CHANNELS = 16
"""output channels that are compared"""
ENOUGH = 0.02
"""seconds of trying one way"""

_chosen: dict[Hashable, Way | None] = {}
_lock = threading.RLock()


def way(
    case: Hashable, ways: Mapping[str, Way], plain: Way, w: QuantizedWeight, x: Tensor, axis: int, limit: float
) -> Way | None:
    """The fastest of `ways` within `limit` of plain for weights and inputs like these; None where none is right.

    axis: that of the output's channels. case: what the ways depend on beside the shapes of w and x.
    """
    layout = (w.shape, w.bits, w.group_size, w.zero is None, w.codebook is None)
    size = (x.shape[axis], x.numel().bit_length())
    key = (case, *ways, *layout, *size, x.device, x.dtype, torch.get_num_threads())
    if key not in _chosen:
        with _lock:
            if key not in _chosen:
                _chosen[key] = _try(ways, plain, w, x, axis, limit)
    return _chosen[key]


def forget() -> None:
    """Try everything again."""
    _chosen.clear()


def _try(ways: Mapping[str, Way], plain: Way, w: QuantizedWeight, x: Tensor, axis: int, limit: float) -> Way | None:
    probe = torch.empty_like(x, device="cpu").normal_(generator=torch.Generator().manual_seed(0)).to(x.device)
    some = torch.linspace(0, w.out_features - 1, min(CHANNELS, w.out_features)).long().to(x.device)
    expected = plain(channels(w, some), probe, None)
    right = {}
    for name, compute in ways.items():
        problem = _problem(compute, w, probe, some, axis, expected, limit)
        if problem is None:
            right[name] = compute
        else:
            log.warning(
                "OneStep: the %s kernel is not used for weights of %s and inputs of %s on %s: %s. Slower ones are.",
                name, tuple(w.shape), tuple(x.shape), x.device, problem,
            )  # fmt: skip
    if len(right) < 2:
        return next(iter(right.values()), None)
    return min(right.values(), key=lambda compute: seconds(lambda: compute(w, probe, None), 3))


def _problem(compute: Way, w, probe: Tensor, some: Tensor, axis: int, expected: Tensor, limit: float) -> str | None:
    """What is wrong with a way of computing, in words."""
    try:
        y = compute(w, probe, None).index_select(axis, some)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as e:
        return f"it fails ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
    error = ((y.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()
    return None if error <= limit else f"relative error {error:.2g}, where {limit:g} is allowed"


def channels(w: QuantizedWeight, index: Tensor) -> QuantizedWeight:
    """Some output channels of a weight, without its low-rank branch."""
    scale, zero = w.scale[:, index], None if w.zero is None else w.zero[:, index]
    return replace(
        w, codes=w.codes[index], scale=scale, zero=zero, shape=(len(index), *w.shape[1:]), up=None, down=None
    )


def seconds(run: Callable[[], object], times: int) -> float:
    """Shortest of some runs; fewer where they are long."""
    taken = []
    while len(taken) < times and sum(taken) < ENOUGH:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


@functools.cache
def integers_are_fast() -> bool:
    """Whether this CPU multiplies int8 matrices faster than fp32 ones by enough to pay for rounding.

    4 to 10 times with AVX512-VNNI or AMX, about 1 without: the bound is far from both, so the answer never flips.
    """
    a, b = torch.ones(256, 1024), torch.ones(1024, 1024)
    c, d = a.to(torch.int8), b.to(torch.int8)
    if int(torch._int_mm(c, d)[-1, -1]) != 1024:
        log.warning("OneStep: torch._int_mm is wrong on this machine. Activations stay in floating point.")
        return False
    torch.mm(a, b)
    return 2 * seconds(lambda: torch._int_mm(c, d), 5) < seconds(lambda: torch.mm(a, b), 5)
