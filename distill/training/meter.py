"""How much memory a piece of work takes at its peak, beyond what is there when it begins."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter:
    """with Meter(device, known) as meter: ...; then meter.peak has bytes.

    CUDA's allocator counts by itself. Elsewhere every tensor that an operation makes is counted until it dies, forwards
    and backwards; what an operation takes inside itself is not seen. known: tensors that may die meanwhile, such as
    gradients.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor] = ()):
        self.device, self.peak = device, 0
        self.count = None if device.type == "cuda" else _Count(known)

    def __enter__(self) -> Meter:
        if self.count is not None:
            self.count.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.count is not None:
            self.count.__exit__(*exception)
            self.peak = self.count.peak
        else:
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before


class _Count(TorchDispatchMode):
    """Storages by birth and death."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live: set[int] = set()
        self.now = self.peak = 0
        for tensor in known:
            self.meet(tensor, new=False)

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self.meet(tensor, new=False)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            self.meet(tensor, new=True)
        return out

    def meet(self, tensor: Any, new: bool) -> None:
        """Count a storage that is met for the first time, and its death whether or not it is new."""
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live.add(key)
        weakref.finalize(storage, self.died, key, size).atexit = False
        if new:
            self.now += size
            self.peak = max(self.peak, self.now)

    def died(self, key: int, size: int) -> None:
        """A storage is gone."""
        self.live.discard(key)
        self.now -= size


def capacity(device: torch.device) -> int:
    """Bytes of a device's memory; of the CPU's, what this process may take (control groups)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(psutil.virtual_memory().total, int(text) if text.isdigit() else 2**63)
