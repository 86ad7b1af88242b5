"""Quantized layers cut and stacked along their output rows, which leaves every number as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .weight import QuantizedWeight


def take(w: QuantizedWeight, rows: slice | Tensor) -> QuantizedWeight:
    """Some outputs of a layer; a slice of rows gives views."""
    found = {f: t[rows] for f, t in w.fields().items() if f in ("codes", "up")}
    found |= {f: t[:, rows] for f, t in w.fields().items() if f in ("scale", "zero")}
    return replace(w, shape=(len(found["codes"]), *w.shape[1:]), **found)


def stack(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Layers of one input as one, in this order; None where their formats or what they do to the input differ."""
    first, fields = parts[0], parts[0].fields()
    for w in parts[1:]:
        shared = [f for f in ("pre_quant_scale", "codebook") if f in fields]
        if _kind(w) != _kind(first) or not all(torch.equal(getattr(w, f), fields[f]) for f in shared):
            return None
    found = {"codes": torch.cat([w.codes for w in parts])}
    found |= {f: torch.cat([getattr(w, f) for w in parts], 1) for f in ("scale", "zero") if f in fields}
    if first.up is not None:  # each branch sees the input and writes its own rows
        found["up"] = torch.block_diag(*(w.up for w in parts))
        found["down"] = torch.cat([w.down for w in parts])
    return replace(first, shape=(sum(w.shape[0] for w in parts), *first.shape[1:]), **found)


def _kind(w: QuantizedWeight) -> tuple:
    return (w.bits, w.flat, w.group_size, w.shape[1:], w.int8_activations, *w.fields())
