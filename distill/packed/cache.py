"""What is known of a weight, kept as long as the weight lives: two numbers about it, and small ones dequantized.

Calling torch takes longer than computing on a small layer. So layers of up to SMALL weights are dequantized once, as
long as all of them together stay below ROOM: a small model then runs about as fast as a dense one, and a large model,
whose layers are larger, keeps next to nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .weight import QuantizedWeight

SMALL = 1 << 18
"""weights of a layer: 1 MB"""
ROOM = 32 << 20
"""bytes that all small layers of the process may take"""

_lock = threading.Lock()
_dense = WeakTensorKeyDictionary()  # codes -> (the other tensors, dense weight)


def remembered(measure: Callable[[QuantizedWeight], Any]) -> Callable[[QuantizedWeight], Any]:
    """Measured once for each weight."""
    known = WeakTensorKeyDictionary()

    def recall(w: QuantizedWeight) -> Any:
        found = _get(known, w)
        if found is None:
            found = measure(w)
            known[w.codes] = (_others(w), found)
        return found

    return recall


def small_dense(w: QuantizedWeight) -> Tensor | None:
    """w.dequantize() if w is small, kept if there is room: the same bits whatever other models are loaded."""
    if w.out_features * w.in_features > SMALL:
        return None
    found = _get(_dense, w)
    if found is None:
        with _lock, torch.inference_mode(False), torch.no_grad():
            found = w.dequantize().contiguous()
            if sum(t.nbytes for _, t in _dense.values()) + found.nbytes <= ROOM:
                _dense[w.codes] = (_others(w), found)
    return found


def _others(w: QuantizedWeight) -> tuple:
    return (w.scale, w.zero, w.pre_quant_scale, w.down, w.up, w.codebook)


def _get(known: WeakTensorKeyDictionary, w: QuantizedWeight) -> Any:
    """What is known of a weight made of these very tensors."""
    others, found = known.get(w.codes, (None, None))
    return found if others is not None and all(a is b for a, b in zip(others, _others(w))) else None
