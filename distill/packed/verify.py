"""Which way of computing is right here: tried once for each weight's and input's shape, type and device.

The caller says which ways there are, the best first, by a rule on shape and machine; nothing is timed, so that one
file and one input give the same numbers in every process. A way is tried on random numbers, not on what it is called
with, and compared with plain dequantization on some output channels. One that disagrees, or fails, is refused with a
warning: torch 2.13's compiled bf16 multiplication, to name one, is wrong at some shapes.
"""

from __future__ import annotations

import functools
import logging
import threading
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

_chosen: dict[Hashable, Way | None] = {}
_lock = threading.RLock()


def way(
    case: Hashable, ways: Mapping[str, Way], plain: Way, w: QuantizedWeight, x: Tensor, axis: int, limit: float
) -> Way | None:
    """The first of `ways` within `limit` of plain for weights and inputs like these; None where none is right.

    axis: that of the output's channels. case: what the ways depend on beside the shapes of w and x. Nothing but what
    is in the key decides, so one input meets the same way whatever was computed before it.
    """
    layout = (w.shape, w.flat, w.bits, w.group_size, w.zero is None, w.codebook is None)
    key = (case, *ways, *layout, x.shape, x.is_contiguous(), x.device, x.dtype)
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
    for name, compute in ways.items():
        problem = _problem(compute, w, probe, some, axis, expected, limit)
        if problem is None:
            return compute
        log.warning(
            "OneStep: the %s kernel is not used for weights of %s and inputs of %s on %s: %s. Slower ones are.",
            name, tuple(w.shape), tuple(x.shape), x.device, problem,
        )  # fmt: skip
    return None


def _problem(
    compute: Way, w: QuantizedWeight, probe: Tensor, some: Tensor, axis: int, expected: Tensor, limit: float
) -> str | None:
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


VNNI = ("_is_vnni_supported", "_is_avx512_vnni_supported", "_is_cpu_support_avx512_vnni")
"""torch's question for it, whose name changed from version to version"""


@functools.cache
def integers_are_fast() -> bool:
    """Whether this CPU multiplies int8 matrices faster than fp32 ones by enough to pay for rounding: 4 to 10 times with
    AVX512-VNNI, which AMX comes with, about as fast without. Also asks torch._int_mm for a product that is known."""
    asked = next((getattr(torch.cpu, name) for name in VNNI if hasattr(torch.cpu, name)), None)
    if asked is None or not asked():
        return False
    a, b = torch.ones(32, 1024, dtype=torch.int8), torch.ones(1024, 32, dtype=torch.int8)
    if int(torch._int_mm(a, b)[-1, -1]) != 1024:
        log.warning("OneStep: torch._int_mm is wrong on this machine. Activations stay in floating point.")
        return False
    return True
