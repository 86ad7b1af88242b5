"""GGUF, read without the gguf package: a header of counted strings and numbers, then aligned tensors.

Every count is checked against the bytes that are there before anything is made from it, which the package's own reader
does not do. Tensors are mapped, so a file costs memory only for what is converted. Layout: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...header import CheckpointError
from . import gguf_names
from .ggml import KINDS, Kind
from .regroup import Told, entries

MAGIC = b"GGUF"
ORIGINAL = "comfy.gguf.orig_shape."
"""ComfyUI-GGUF: the true shape of a tensor that was stored as rows of 256"""
LARGEST = 1 << 31
"""numbers in a tensor"""
MOST = 1 << 16
"""tensors and metadata values; real files have thousands, and a million take a minute to read"""
WORDS = 1 << 20
"""strings in an array: vocabularies have up to 300,000"""
LONGEST = 1 << 26
"""bytes of a string: OneStep's metadata holds tokenizers"""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Info:
    """Where a tensor lies, and of which type and shape it is."""

    name: str
    shape: tuple[int, ...]
    """as torch counts: the last runs fastest"""
    kind: Kind
    start: int
    """first byte, from the file's start"""

    @property
    def nbytes(self) -> int:
        """Of the tensor in the file."""
        return math.prod(self.shape) // self.kind.block * self.kind.nbytes


class Cursor:
    """Reads numbers and strings; raises CheckpointError where the file ends first."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def bytes(self, count: int) -> bytes:
        """The next n bytes. Raises CheckpointError past the end."""
        if count > len(self.data) - self.at:
            raise broken(self.path, f"its header wants {count} bytes at {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str):
        """The next number, by struct's letter."""
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        """The next counted string."""
        length = self.number("Q")
        if length > LONGEST:
            raise broken(self.path, f"a string of {length} bytes at {self.at}")
        return self.bytes(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0):
        """One metadata value. Arrays of strings are passed over (vocabularies): None."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise broken(self.path, f"its metadata has a value of type {kind} at {self.at}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            raw = self.bytes(count * struct.calcsize(_SCALARS[inner]))
            return struct.unpack(f"<{count}{_SCALARS[inner]}", raw) if count <= 16 else None
        if count > WORDS:
            raise broken(self.path, f"its metadata has an array of {count} values at {self.at}")
        for _ in range(count):
            self.value(inner, depth + 1)
        return None


def broken(path: Path, problem: str) -> CheckpointError:
    """The error for a file that is damaged."""
    return CheckpointError(f"{path}: damaged GGUF: {problem}. Download it again.")


def header(path: Path, data: mmap.mmap) -> tuple[dict, list[Info]]:
    """Metadata (scalars, strings, short arrays) and where each tensor lies, checked against the file's size."""
    cursor = Cursor(path, data)
    cursor.bytes(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version!r}; 2 and 3 are read here. Convert the model again.")
    tensors, values = cursor.number("Q"), cursor.number("Q")
    if max(tensors, values) > MOST:
        raise broken(path, f"its header counts {tensors} tensors and {values} values")
    metadata = {}
    for _ in range(values):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.number("I"))
    infos = [_info(cursor) for _ in range(tensors)]
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or not 0 < align <= 1 << 20 or align & (align - 1):
        raise broken(path, f"its alignment is {align!r}")
    base = -(-cursor.at // align) * align
    infos = [Info(i.name, i.shape, i.kind, base + i.start) for i in infos]
    for i in infos:
        if i.start + i.nbytes > len(data) or i.start % align:
            raise CheckpointError(
                f"{path}: truncated or damaged: tensor {i.name!r} lies at {i.start} to {i.start + i.nbytes} "
                f"of {len(data)} bytes. Download it again."
            )
    order = sorted(infos, key=lambda i: i.start)
    for a, b in zip(order, order[1:]):
        if a.start + a.nbytes > b.start:
            raise broken(path, f"tensors {a.name!r} and {b.name!r} overlap")
    if len({i.name for i in infos}) < len(infos):
        raise broken(path, "two tensors have one name")
    return metadata, infos


def _info(cursor: Cursor) -> Info:
    name = cursor.string()
    dims = cursor.number("I")
    if dims > 8:
        raise broken(cursor.path, f"tensor {name!r} has {dims} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dims)]))
    ggml, start = cursor.number("I"), cursor.number("Q")
    if ggml not in KINDS:
        known = ", ".join(k.name for k in KINDS.values() if k.decode)
        raise CheckpointError(f"{cursor.path}: tensor {name!r} has ggml type {ggml}, none of {known}. Get such a file.")
    kind = KINDS[ggml]
    whole = (shape[-1] if shape else 1) % kind.block == 0
    if 0 in shape or math.prod(shape) >= LARGEST or not whole:
        raise broken(cursor.path, f"tensor {name!r} is {kind.name} of shape {shape}")
    return Info(name, shape, kind, start)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights in contract form and the metadata's strings. Raises CheckpointError."""
    with path.open("rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # private: torch wants to be able to write
    metadata, infos = header(path, data)
    names = gguf_names.rename(metadata.get("general.architecture"), [i.name for i in infos], path)
    # stable-diffusion.cpp, which names no architecture, gives SDXL's linear projections the shape (n, n, 1, 1)
    linear = "general.architecture" not in metadata and any(i.name.endswith("label_emb.0.0.weight") for i in infos)
    weights: dict[str, Tensor] = {}
    told = Told()
    for i in infos:
        shape = _shape(path, i, metadata)
        if linear and i.name.endswith((".proj_in.weight", ".proj_out.weight")) and shape[2:] == (1, 1):
            shape = shape[:2]
        if names[i.name] == "shared.weight" and shape[:1] == (gguf_names.UMT5,):
            raise CheckpointError(
                f"{path}: UMT5 as GGUF holds its tokenizer as ComfyUI cannot read it. Get safetensors."
            )
        weights |= _entries(path, data, i, names[i.name], shape, told)
    told.say(path)
    strings = {k: v if isinstance(v, str) else str(v) for k, v in metadata.items() if v is not None}
    return weights, strings


def _shape(path: Path, info: Info, metadata: dict) -> tuple[int, ...]:
    shape = metadata.get(ORIGINAL + info.name, info.shape)
    sound = isinstance(shape, tuple) and len(shape) <= 8 and all(isinstance(s, int) and s > 0 for s in shape)
    if not sound or math.prod(shape) != math.prod(info.shape):
        raise broken(path, f"{ORIGINAL}{info.name} is {shape!r} where the tensor is {info.shape}")
    return shape


def _entries(path: Path, data, info: Info, key: str, shape: tuple[int, ...], told: Told) -> dict[str, Tensor]:
    raw = torch.frombuffer(data, dtype=torch.uint8, count=info.nbytes, offset=info.start)
    if info.kind.dtype is not None:
        if info.start % info.kind.nbytes:  # alignment of less than a number
            raw = raw.clone()
        return {key: raw.view(info.kind.dtype).view(shape)}
    groups = info.kind.decode(raw.view(-1, info.kind.nbytes))
    made = entries(key, shape, groups, told)
    _forget(data, info)
    return made


def _forget(data: mmap.mmap, info: Info) -> None:
    """The file's pages that were converted leave memory (where the system has a word for it)."""
    first = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (info.start + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED, first, length)
