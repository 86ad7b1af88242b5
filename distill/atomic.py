"""Files that are whole or absent: written beside their place, synced, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

AGE = 3600.0
"""Seconds after which a temporary is taken for one that a killed process left."""


def replace(path: Path, data: bytes) -> None:
    """Write data to path, atomically: the file is the old one or the new one, never half of it."""
    write_beside(path, lambda temporary: temporary.write_bytes(data))


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary path), sync, rename to path, sync the folder. The file gets the mode that umask gives.

    The temporary lies in a folder of its own, beside path: writers have temporaries too (safetensors' are named at
    random, and readable by their owner alone), and all of a killed process's can be told by the folder.
    """
    clean(path.parent, path.name, AGE)
    room = Path(tempfile.mkdtemp(suffix=".tmp", prefix=f".{path.name}.", dir=path.parent))
    temporary = room / path.name
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    sync(path.parent)


def clean(folder: Path, names: str, age: float = 0.0) -> None:
    """Remove what killed processes left of files whose names fit the pattern, if it is older than `age` seconds."""
    for room in folder.glob(f".{names}.*.tmp"):
        if time.time() - room.stat().st_mtime >= age:
            shutil.rmtree(room, ignore_errors=True)


def sync(path: Path) -> None:
    """Write a file or a folder through to the disk. Raises OSError."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    except PermissionError:  # Windows does not open folders; its rename is journalled
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
