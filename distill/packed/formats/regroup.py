"""From a foreign tensor's flat groups to a layer of the contract, exactly where its groups lie in rows.

GGUF and bitsandbytes cut a weight into groups of consecutive numbers in the order (out, in, kh, kw). A matrix or a 1x1
convolution whose K is a multiple of the group takes them as they are. A larger convolution does not: the contract's
groups lie along channels, (out, kh, kw, in), so its weight is rounded again, to 8 bits a number: an error of about
0.4 %, a twentieth of what 4 bits cost before. What fits neither is kept dense. Both are counted and said.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..weight import QuantizedWeight, group_for, pack_nibbles, to_matrix
from .ggml import Groups

log = logging.getLogger(__name__)
ROWS = 1 << 18
"""numbers that are dense at a time while a layer is rounded again"""
TABLE = re.compile(
    r"(^|[._])(embed|embeds|embeddings?|embed_tokens|tok_embeddings|token_embd|wte|wpe|shared|\w*_embedding|"
    r"relative_attention_bias|\w*norm\w*)\.weight$"
)
"""weights of two dimensions that a lookup reads, or a norm multiplies by: no layer computes x W^T with them"""


def is_layer(key: str, shape: tuple[int, ...]) -> bool:
    """Whether `key` names the weight of a Linear or a Conv2d."""
    return key.endswith(".weight") and len(shape) in (2, 4) and min(shape) > 0 and not TABLE.search(key)


@dataclass
class Told:
    """What a conversion could not keep as it was, gathered for one warning a file."""

    rounded: list[str] = field(default_factory=list)
    """convolutions: now 8 bits a number"""
    dense: list[str] = field(default_factory=list)

    def say(self, path: Path, kind: str) -> None:
        """Log what was rounded again and what stayed dense."""
        if self.rounded:
            log.warning(
                "%s: %d convolutions rounded again, to 8 bits along channels (%s groups run across kernels): %s",
                *(path, len(self.rounded), kind, _some(self.rounded)),
            )
        if self.dense:
            log.warning("%s: %d weights made dense, 16 bits: %s", path, len(self.dense), _some(self.dense))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def entries(key: str, shape: tuple[int, ...], groups: Groups, told: Told) -> dict[str, Tensor]:
    """The contract's entries for the weight called `key`, `shape` (out, in[, kh, kw]); groups are in its flat order."""
    count = groups.codes.numel()
    k, group = count // shape[0], count // groups.scale.numel()
    if is_layer(key, shape) and k % group == 0:
        prefix = key.removesuffix(".weight")
        if len(shape) == 2 or shape[2:] == (1, 1):
            return in_rows(groups, shape, k // group).to_tensors(prefix)
        if fine := group_for(shape[1], 32):
            told.rounded.append(prefix)
            return along_channels(groups, shape, fine).to_tensors(prefix)
    if not TABLE.search(key):
        told.dense.append(key)
    w = dense(groups, shape)
    return {key: w.half() if w.abs().amax() < torch.finfo(torch.float16).max else w}


def in_rows(groups: Groups, shape: tuple[int, ...], per_row: int) -> QuantizedWeight:
    """Exact: the same codes and scales, in the contract's order."""
    n = shape[0]
    codes = groups.codes.reshape(n, -1)
    return QuantizedWeight(
        codes=codes if groups.bits == 8 else pack_nibbles(codes),
        scale=groups.scale.reshape(n, per_row).t().contiguous(),
        zero=None if groups.zero is None else groups.zero.reshape(n, per_row).t().contiguous(),
        shape=shape,
        bits=groups.bits,
        codebook=groups.codebook,
    )


def dense(groups: Groups, shape: tuple[int, ...]) -> Tensor:
    """fp32, `shape`."""
    if groups.codebook is not None:
        w = groups.codebook.float()[groups.codes.long()]
    else:
        w = groups.codes.float() - (0 if groups.bits == 8 else 8)
    w = w.view(groups.scale.numel(), -1) * groups.scale.float().reshape(-1, 1)
    if groups.zero is not None:
        w = w + groups.zero.float().reshape(-1, 1)
    return w.view(shape)


def along_channels(groups: Groups, shape: tuple[int, ...], group: int) -> QuantizedWeight:
    """Rounded again to 8 bits, symmetric, groups along channels; some rows at a time, to need little memory."""
    n, k = shape[0], math.prod(shape[1:])
    flat = [None if t is None else t.reshape(n, -1) for t in groups[:3]]
    codes, scale = torch.empty(n, k, dtype=torch.int8), torch.empty(k // group, n)
    step = max(1, ROWS // k)
    for at in range(0, n, step):
        rows = slice(at, min(at + step, n))
        some = Groups(*(None if t is None else t[rows] for t in flat), *groups[3:])
        w = to_matrix(dense(some, (rows.stop - at, *shape[1:])))  # (rows, K), OHWI
        w = w.reshape(len(w), -1, group)
        s = (w.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        codes[rows] = (w / s).round_().view(len(w), k)
        scale[:, rows] = s.squeeze(-1).t()
    return QuantizedWeight(codes, scale, None, shape, bits=8)
