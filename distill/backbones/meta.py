"""Modules without weights, to be filled from a file."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """make() with its parameters on the meta device (its buffers are real), in eval mode."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make().eval().requires_grad_(False)
