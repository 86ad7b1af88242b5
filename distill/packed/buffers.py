"""Memory to compute in: buffers that a thread keeps, and large results in huge pages.

Fresh memory costs more than arithmetic: the first touch of each 4 kB page is a fault, 1 us on bare metal and 2-3 us
on virtual machines, which is 0.25 to 0.75 ns a byte where copying takes 0.1.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

KEPT = 64 << 20
"""bytes: a larger buffer is not kept between calls"""
MAPPED = 32 << 20
"""bytes: above, glibc maps memory anew for each tensor, however often it was freed (DEFAULT_MMAP_THRESHOLD_MAX)"""
PAGE = 4096
MADV_HUGEPAGE = 14

_buffers = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, the same each time for one name and thread. Whoever takes it is done with it on return."""
    size = dtype.itemsize
    for s in shape:
        size *= s
    kept = _buffers.__dict__.get(name)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # what is made in inference mode may not be written outside of it
            kept = torch.empty(size, dtype=torch.uint8)
        if size <= KEPT:
            _buffers.__dict__[name] = kept
    return kept[:size].view(dtype).view(shape)


def result(*shape: int) -> Tensor:
    """A new fp32 tensor, uninitialised; in huge pages where it is large and Linux grants them: a fault for 2 MB."""
    y = torch.empty(shape)
    size = 4 * y.numel()
    if size >= MAPPED and (advise := _madvise()):
        first = -(-y.data_ptr() // PAGE) * PAGE
        advise(first, (y.data_ptr() + size) // PAGE * PAGE - first, MADV_HUGEPAGE)  # refusal changes nothing
    return y


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    return madvise
