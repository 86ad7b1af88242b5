"""Rows of tensors on disk, in shards: safetensors files, each whole or absent, with a checksum.

A shard that a killed process was writing is absent; a damaged one is told by its name, and is made again by whoever
asked. Batches are drawn from the files, which are mapped, not read.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import write_beside
from .denoiser import Cond, map_cond

log = logging.getLogger(__name__)

ROWS = 256
"""Rows a shard: what a kill loses at most. SD 1.5's embeddings of so many prompts are 60 MB."""


@dataclass(frozen=True)
class Rows:
    """`count` rows, in shards of `each`; rows[numbers] is a batch of them."""

    like: Cond
    """Some row: its structure is that of a batch, its tensors say what a batch's are (dtype)."""
    count: int
    shard: Callable[[int], list[Tensor]]
    """A shard's number -> its tensors, batch first, in the order in which map_cond meets them."""
    each: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, numbers: Iterable[int]) -> Cond:
        """The rows of B numbers, batch first. Tensors are where the shards are, a mapped one's on the CPU."""
        places = [divmod(int(n), self.each) for n in numbers]
        shards = {i: self.shard(i) for i in {i for i, _ in places}}
        leaf = itertools.count()

        def gather(row: Tensor) -> Tensor:
            k = next(leaf)
            return torch.stack([shards[i][k][j] for i, j in places]).to(row.dtype)

        return map_cond(gather, self.like)


def leaves(tree: Cond) -> list[Tensor]:
    """The tensors of a condition, in map_cond's order."""
    found: list[Tensor] = []
    map_cond(lambda v: found.append(v) or v, tree)
    return found


def mapped(folder: Path) -> Callable[[int], list[Tensor]]:
    """A folder's shards by number, the last ones kept open."""
    return lru_cache(64)(lambda i: read(place(folder, i)))


def place(folder: Path, i: int) -> Path:
    """Where a shard lies."""
    return folder / f"{i:06d}.safetensors"


def read(path: Path) -> list[Tensor]:
    """A shard's tensors, mapped: what is not asked for is not read."""
    with safe_open(path, framework="pt") as f:
        return [f.get_tensor(str(k)) for k in range(len(f.keys()))]


def write(path: Path, tensors: list[Tensor], dtype: torch.dtype | None = None, notes: str = "") -> None:
    """Write a shard. dtype: of floating point numbers, by default as they are; notes: what `sound` gives back."""
    kept = [t.detach().cpu().to(dtype if dtype and t.is_floating_point() else t.dtype).contiguous() for t in tensors]
    named, strings = {str(k): t for k, t in enumerate(kept)}, {"onestep.crc32": str(_sum(kept, notes))}
    strings |= {"onestep.notes": notes} if notes else {}
    write_beside(path, lambda temporary: save_file(named, temporary, strings))


def sound(path: Path, count: int | None = None) -> str | None:
    """The notes of a shard that is there, whole and unchanged, with `count` rows; else None, a damaged one told."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            said = f.metadata() or {}
        tensors, notes = read(path), said.get("onestep.notes", "")
        rows = len(tensors[0]) if count is None else count
        if str(_sum(tensors, notes)) == said.get("onestep.crc32") and all(len(t) == rows for t in tensors):
            return notes
        reason = "its checksum is another"
    except (SafetensorError, OSError) as e:
        reason = str(e)
    log.warning("%s is damaged (%s): it is made again", path, reason)
    return None


def _sum(tensors: list[Tensor], notes: str) -> int:
    """Over all bytes of a shard's tensors, and its notes."""
    total = zlib.crc32(notes.encode())
    for t in tensors:
        total = zlib.crc32(as_bytes(t), total)
    return total


def as_bytes(t: Tensor) -> memoryview:
    """A CPU tensor's bytes."""
    return memoryview(t.contiguous().view(-1).view(torch.uint8).numpy())


def hashed(*things: Any) -> str:
    """A key of texts, bytes and numbers, and of lists of them."""
    digest = blake2b(digest_size=12)

    def take(thing: Any) -> None:
        if isinstance(thing, list | tuple):
            digest.update(b"[%d" % len(thing))
            for inner in thing:
                take(inner)
            return
        data = thing if isinstance(thing, bytes) else str(thing).encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data) + data)

    take(things)
    return digest.hexdigest()
