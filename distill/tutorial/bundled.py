"""The models and the judge that come with this copy."""

from __future__ import annotations

from pathlib import Path

from ..header import CheckpointError

ASSETS = Path(__file__).parent / "assets"


def bundled(name: str) -> Path:
    """Path of a bundled file: student, teacher, weak (the teacher's early checkpoint) or judge.

    Raises CheckpointError where this copy lacks it.
    """
    path = ASSETS / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: this copy of OneStep lacks it. Get it from the repository, or train your own.")
    return path


def find(model: str | Path) -> Path:
    """The path of a bundled model by its name, or the path as it is."""
    return bundled(str(model)) if str(model) in ("student", "teacher", "weak") else Path(model)
