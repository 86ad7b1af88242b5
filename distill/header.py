"""The header of a safetensors file, read and checked without its tensors. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A file that breaks the contract. The first line names the file, the value and the cure."""


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of any safetensors file, with the file's length checked against it. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Put it there, or choose another file.")
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(9)
        length = int.from_bytes(start[:8], "little")
        if size < 9 or start[8:] != b"{" or length > 100_000_000:  # the format's own limit
            cure = "Convert it to safetensors."
            if start.startswith(b"version "):
                cure = "It is a git-lfs pointer: fetch the real file with `git lfs pull`."
            raise CheckpointError(f"{path}: not a safetensors file. {cure}")
        text = start[8:] + f.read(length - 1)
    if len(text) < length:
        raise CheckpointError(f"{path}: truncated: {size} bytes, and its header alone is longer. Download it again.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON. Download it again.") from None
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        whole = size >= expected
    except (AttributeError, KeyError, IndexError, TypeError):
        raise CheckpointError(f"{path}: damaged: its header is not a table of tensors. Download it again.") from None
    if not whole:
        raise CheckpointError(f"{path}: truncated: {size} of {expected} bytes. Download it again.")
    return header
