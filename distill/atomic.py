"""Files that are whole or absent: written in a folder beside their place, synced, renamed."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

PREFIX = ".onestep-"
"""folders of files that are being written: this, the process, its machine and some letters. Nothing in them has a
model's ending, so that no list of models shows it."""
HERE = f"{zlib.crc32(platform.node().encode()):08x}"
"""this machine, among those that write into one folder: another's processes have numbers of their own"""
OLD = "replaced.by"
"""in such a folder: what was at the place of the folder beside it"""
DAY = 86_400
_mine: set[str] = set()


def replace(path: Path, data: bytes) -> None:
    """Write data to path, atomically: the file is the old one or the new one, never half of it."""
    write_beside(path, lambda temporary: temporary.write_bytes(data))


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary path), sync, rename to path, sync the folder; first, what killed processes left there goes.

    The file may be read by whom the umask says, whatever the library that wrote it thinks. Raises OSError, of one line
    with the path, where the disk is full or closed: what was at path before is there still.
    """
    folder = None
    try:
        clean(path.parent)
        folder = _beside(path)
        temporary = folder / "new"
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as e:
        if not isinstance(e, OSError) and "(os error " not in str(e):  # so safetensors passes on what the system said
            raise
        reason = getattr(e, "strerror", None) or str(e)
        cure = "What was there is unchanged; make room, or choose another place."
        raise OSError(f"{path}: cannot be written: {reason}. {cure}") from e
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _mine.discard(folder.name)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary folder), sync, and let it take the place of the folder at path, if there is one.

    A process that is killed between the two renames leaves both; `clean` then puts the new one in its place.
    """
    clean(path.parent)
    folder = _beside(path)
    try:
        new = folder / path.name
        new.mkdir()
        write(new)
        for file in new.rglob("*"):
            sync(file)
        if path.exists():
            os.replace(path, folder / OLD)
        os.replace(new, path)
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _mine.discard(folder.name)


def _beside(path: Path) -> Path:
    """A new folder of this process beside a path."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}@{HERE}-", dir=path.parent))
    _mine.add(folder.name)
    return folder


def clean(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left in a folder, whatever library they wrote with. A
    whole folder whose place they had cleared already takes it."""
    for left in folder.glob(f"{PREFIX}*-*"):
        pid, _, machine = left.name.removeprefix(PREFIX).partition("-")[0].partition("@")
        if pid.isdecimal() and left.name not in _mine and not _writing(int(pid), machine, left):
            for whole in left.iterdir() if (left / OLD).exists() else ():
                if whole.name != OLD and not (folder / whole.name).exists():
                    os.replace(whole, folder / whole.name)
            shutil.rmtree(left, ignore_errors=True)


def _writing(pid: int, machine: str, folder: Path) -> bool:
    """Whether the process that made a folder may still be writing in it."""
    try:
        if machine != HERE or os.name == "nt":  # where os.kill ends the process
            return time.time() - folder.stat().st_mtime < DAY
        if pid == os.getpid():
            return False  # then it would be one of _mine: it is of an earlier process of this number
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def sync(path: Path) -> None:
    """What was written to a file, or into a folder, is on the disk when this returns."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    except PermissionError:  # Windows does not open folders; its rename is journalled
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
