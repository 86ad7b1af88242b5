"""Rows that are dear to make, such as embeddings of prompts and latents of pictures: made once, and mapped from disk.

A cache is a folder of safetensors shards, each whole or absent, with a checksum. What a killed process has made is
found again; a damaged shard is told by its name and made again. Batches are drawn from the files, not from memory.
"""

from __future__ import annotations

import itertools
import logging
import os
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

from ..atomic import write_beside
from ..backbones.base import Backbone
from ..denoiser import Cond, map_cond
from ..methods.base import Told
from .processes import part_at_exit

log = logging.getLogger(__name__)

ROWS = 256
"""Rows a shard: what a kill loses at most. SD 1.5's embeddings of so many prompts are 60 MB."""
Make = Callable[[range], Cond]
"""Numbers of rows -> these rows, batch first: tensors in dicts, lists and tuples."""


@dataclass(frozen=True)
class Rows:
    """`count` rows, in shards; rows[numbers] is a batch of them."""

    like: Cond
    """Some row: its structure is that of a batch, its tensors say what a batch's are (dtype)."""
    count: int
    shard: Callable[[int], list[Tensor]]
    """A shard's number -> its tensors, batch first, in the order in which map_cond meets them."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, numbers: Iterable[int]) -> Cond:
        """The rows of B numbers, batch first. Tensors are where the shards are, a mapped one's on the CPU."""
        places = [divmod(int(n), ROWS) for n in numbers]
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


def in_memory(make: Make, count: int) -> Rows:
    """All rows, made now and held where `make` puts them."""
    shards = [leaves(make(part)) for part in _parts(count)]
    return Rows(make(range(1)), count, shards.__getitem__)


def on_disk(
    folder: Path, key: str, make: Make, count: int, dtype: torch.dtype | None = None, told: Told | None = None
) -> Rows:
    """Rows in folder/key: those that are there and sound, the others made now.

    key: of all that the rows depend on (`hashed`). dtype: how floating point numbers are stored, by default as they are
    made. told(what, share) after each shard. Several processes (torchrun) make them together.
    """
    like, folder = make(range(1)), folder / key
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parts = _parts(count)
    for i in range(rank, len(parts), world):
        path = _path(folder, i)
        if not _sound(path, len(parts[i])):
            _write(path, leaves(make(parts[i])), dtype)
        if told is not None:
            told("embeddings", (i + 1) / len(parts))
    if world > 1:
        from accelerate import PartialState

        PartialState(cpu=leaves(like)[0].device.type == "cpu").wait_for_everyone()
        part_at_exit()
    return Rows(like, count, lru_cache(64)(lambda i: _read(_path(folder, i))))


def _parts(count: int) -> list[range]:
    return [range(i, min(i + ROWS, count)) for i in range(0, count, ROWS)]


def _path(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.safetensors"


def _read(path: Path) -> list[Tensor]:
    """A shard's tensors, mapped: what is not asked for is not read."""
    with safe_open(path, framework="pt") as f:
        return [f.get_tensor(str(k)) for k in range(len(f.keys()))]


def _write(path: Path, tensors: list[Tensor], dtype: torch.dtype | None) -> None:
    kept = [t.detach().cpu().to(dtype if dtype and t.is_floating_point() else t.dtype).contiguous() for t in tensors]
    named, strings = {str(k): t for k, t in enumerate(kept)}, {"onestep.crc32": str(_sum(kept))}
    write_beside(path, lambda temporary: save_file(named, temporary, strings))


def _sound(path: Path, count: int) -> bool:
    """Whether a shard is there, whole and unchanged; one that is damaged is told."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as f:
            expected = (f.metadata() or {}).get("onestep.crc32")
        tensors = _read(path)
        if str(_sum(tensors)) == expected and all(len(t) == count for t in tensors):
            return True
        reason = "its checksum is another"
    except (SafetensorError, OSError) as e:
        reason = str(e)
    log.warning("%s is damaged (%s): it is made again", path, reason)
    return False


def _sum(tensors: list[Tensor]) -> int:
    """Over all bytes of a shard's tensors."""
    total = 0
    for t in tensors:
        total = zlib.crc32(_bytes(t), total)
    return total


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.contiguous().view(-1).view(torch.uint8).numpy())


# ------------------------------------------------------------------------------------------------------ the key


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


def identity(model: Backbone, parts: Iterable[str]) -> list:
    """What tells some parts of a model, such as its text encoders, from others: classes, weights, tokenizer and sizes.

    Of each tensor 64 values are taken: another training changes all of them, and 10 GB need not be read.
    """

    def sample(v: Tensor) -> bytes:
        flat = v.detach().flatten()
        return bytes(_bytes(flat[:: max(1, len(flat) // 64)][:64].cpu()))

    found: list = [str(model.meta.text_encoder), list(model.shape(1))]
    for name in sorted(parts):
        module = model.parts[name]
        tensors = [[key, list(v.shape), str(v.dtype), sample(v)] for key, v in module.state_dict().items()]
        found.append([name, type(module).__name__, tensors])
    return found
