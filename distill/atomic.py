"""Files that are whole or absent: written beside their place, synced, renamed."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, data: bytes) -> None:
    """Write data to path, atomically: the file is the old one or the new one, never half of it."""
    write_beside(path, lambda temporary: temporary.write_bytes(data))


def write_beside(path: Path, write) -> None:
    """write(temporary path), sync, rename to path, sync the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    except PermissionError:  # Windows does not open folders; its rename is journalled
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
