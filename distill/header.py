"""The header of a safetensors file, read and checked without its tensors. Needs no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

STRANGERS = (
    (b"PK\x03\x04", "a zip archive: a PyTorch checkpoint (.ckpt, .pt, .pth), which may run code when it is opened"),
    (b"\x80", "a pickle, which may run code when it is opened"),
    (b"<", "a web page: the download failed or wanted a login"),
    (b"version https://git-lfs", "a git-lfs pointer; fetch the real file with `git lfs pull`"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "an HDF5 file"),
)
"""first bytes -> what such a file is"""
LORA = "onestep.lora"
"""in the metadata of files that `file.lora` wrote"""
LONGEST = 100_000_000
"""bytes of a header: the format's own limit"""
MOST = 2_400_000
"""values in a header, of 200,000 tensors: parsed, one takes many times its bytes, and no model has so many"""
DIMENSIONS = 64
"""of a tensor: torch's own limit"""


class CheckpointError(ValueError):
    """A file that breaks the contract. The first line names the file, the value and the cure."""


def first_bytes(path: Path) -> bytes:
    """The first 32 bytes of a file. Raises CheckpointError where there is none, or where it is of a kind that holds no
    weights or runs code."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file. Put it there, or choose another file.")
        with path.open("rb") as f:
            start = f.read(32)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be opened: {e.strerror}. Choose another file.") from None
    safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32
    for magic, what in STRANGERS:
        if start.startswith(magic) and not safetensors:  # a header's length may begin with any byte
            raise CheckpointError(f"{path}: not a safetensors file but {what}. Get the model as safetensors.")
    if not start:
        raise CheckpointError(f"{path}: not a safetensors file: it is empty. Download it again.")
    return start


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of any safetensors file: entries of tensors, and under "__metadata__" strings; the file's length
    is checked against it. Raises CheckpointError."""
    path = Path(path)
    start = first_bytes(path)
    size, length = path.stat().st_size, int.from_bytes(start[:8], "little")
    if size < 9 or start[8:9] != b"{" or length > LONGEST:
        raise CheckpointError(f"{path}: not a safetensors file. Choose another, or download it again.")
    with path.open("rb") as f:
        text = f.read(8 + length)[8:]
    if len(text) < length:
        raise CheckpointError(f"{path}: truncated: {size} bytes, and its header alone is longer. Download it again.")
    if _values(text) > MOST:
        raise CheckpointError(f"{path}: damaged: its header has more entries than any model. Download it again.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON. Download it again.") from None
    strings = header.get("__metadata__", {})
    sound = isinstance(strings, dict) and all(isinstance(s, str) for s in strings.values())
    if not (sound and all(_is_entry(entry) for name, entry in header.items() if name != "__metadata__")):
        raise CheckpointError(f"{path}: damaged: its header is not a table of tensors. Download it again.")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise CheckpointError(f"{path}: truncated: {size} of {expected} bytes. Download it again.")
    return header


def _values(text: bytes) -> int:
    """How many strings and other values JSON has at most, told without parsing it."""
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")  # what quotes are left begin or end a string
    if (quotes := plain.count(b'"')) > MOST:
        return quotes
    between = b"".join(plain.split(b'"')[::2])
    return sum(map(between.count, (b",", b"[", b"{")))


def _is_entry(entry: Any) -> bool:
    """Whether this says of what type and shape a tensor is, and where."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or len(shape) > DIMENSIONS:
        return False
    sound = all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, *offsets))
    return sound and offsets[0] <= offsets[1] and math.prod(shape) < 1 << 63
