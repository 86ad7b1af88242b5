"""From a foreign tensor's flat groups to a layer of the contract, number for number where its groups lie in rows.

GGUF and bitsandbytes cut a weight into groups of consecutive numbers in the order (out, in, kh, kw). Whatever has K a
multiple of the group takes them as they are, a convolution with its columns in that order too (`flat`): it is held in
the bytes of its file. What does not fit, the first convolution of 4 channels for one, becomes dense, and that is said.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..weight import QuantizedWeight, narrowed, pack_nibbles
from .ggml import Groups

log = logging.getLogger(__name__)
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

    dense: list[str] = field(default_factory=list)

    def say(self, path: Path) -> None:
        """Log what became dense."""
        if self.dense:
            some = ", ".join(self.dense[:3]) + (", ..." if len(self.dense) > 3 else "")
            log.warning("%s: %d weights made dense, 16 bits: %s", path, len(self.dense), some)


def entries(key: str, shape: tuple[int, ...], groups: Groups, told: Told) -> dict[str, Tensor]:
    """The contract's entries for the weight called `key`, `shape` (out, in[, kh, kw]); groups are in its flat order."""
    count = groups.codes.numel()
    k, group = count // shape[0], count // groups.scale.numel()
    if is_layer(key, shape) and k % group == 0:
        return in_rows(groups, shape, k // group).to_tensors(key.removesuffix(".weight"))
    if not TABLE.search(key):
        told.dense.append(key)
    return {key: narrowed(dense(groups, shape))}


def in_rows(groups: Groups, shape: tuple[int, ...], per_row: int) -> QuantizedWeight:
    """Exact: the same codes and scales."""
    n = shape[0]
    codes = groups.codes.reshape(n, -1)
    return QuantizedWeight(
        codes=codes if groups.bits == 8 else pack_nibbles(codes),
        scale=groups.scale.reshape(n, per_row).t().contiguous(),
        zero=None if groups.zero is None else groups.zero.reshape(n, per_row).t().contiguous(),
        shape=shape,
        bits=groups.bits,
        codebook=groups.codebook,
        flat=math.prod(shape[2:]) > 1,
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
