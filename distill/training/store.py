"""Checkpoints that are whole or absent.

A checkpoint is one safetensors file: tensors by name, everything else as JSON in its metadata. It is written beside its
place, synced and renamed, so a process killed at any moment leaves either the old set of files or the new one.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from torch import Tensor

from ..atomic import clean, write_beside

PATTERN = "step-*.safetensors"


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """folder/step-00001234.safetensors; then removes all but the newest `keep`."""
    from safetensors.torch import save_file

    path = folder / f"step-{step:08d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    write_beside(path, lambda temporary: save_file(tensors, temporary, {"onestep.train": json.dumps(state)}))
    for old in checkpoints(folder)[keep:]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted(folder.glob(PATTERN), reverse=True)


def load(folder: Path) -> tuple[dict[str, Tensor], dict, Path] | None:
    """The newest readable checkpoint, on the CPU; None if there is none. An unreadable one is passed over, loudly.

    Temporary files that a killed process left are removed.
    """
    from safetensors import SafetensorError, safe_open

    clean(folder)
    for path in checkpoints(folder):
        try:
            with safe_open(path, framework="pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["onestep.train"]), path
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path} cannot be read ({error}); trying the one before it", stacklevel=2)
    return None
