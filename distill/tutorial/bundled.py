"""The models and the judge that come with this copy."""

from __future__ import annotations

from pathlib import Path

from ..header import CheckpointError

ASSETS = Path(__file__).parent / "assets"
BUNDLED = ("student", "teacher", "weak")
"""The models; the judge is none."""


def bundled(name: str) -> Path:
    """Path of a bundled file: student, teacher, weak (the teacher's early checkpoint) or judge.

    Raises CheckpointError where this copy lacks it.
    """
    path = ASSETS / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: this copy of OneStep lacks it. Get it from the repository, or train your own.")
    return path


def find(model: str | Path) -> Path:
    """The path of a bundled model by its name, or the path, or the hub's name (org/model), as it is. Raises
    CheckpointError where there is neither."""
    path = Path(model)
    if str(model) in BUNDLED:
        return bundled(str(model))
    if path.exists():
        return path
    from ..backbones.folder import is_hub_name  # torch, which `distill info` does without

    if not is_hub_name(model):
        names = ", ".join(BUNDLED)
        raise CheckpointError(f"{model}: no such file. Give a file or folder, or a bundled model: {names}.")
    return path
