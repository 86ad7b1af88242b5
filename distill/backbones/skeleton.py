"""Modules of any size without memory for their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Build = Callable[[], nn.Module]


class WithoutMemory(TorchFunctionMode):
    """torch.empty, by which layers make their weights, on the meta device: of any size, it takes no memory."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def skeleton(make: Build) -> nn.Module:
    """make() with its parameters on the meta device (its buffers are real), in eval mode."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), WithoutMemory():
        return make().eval().requires_grad_(False)
