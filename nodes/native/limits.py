"""What ComfyUI's classes cannot compute, said in the words of the file that asks for it."""

from __future__ import annotations

from pathlib import Path

from ...distill.header import CheckpointError


def require(path: Path, what: str, config: dict, fixed: dict[str, tuple]) -> None:
    """Raise CheckpointError where a configuration asks for what ComfyUI's class cannot compute."""
    for key, allowed in fixed.items():
        if config.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{path}: wrong architecture: ComfyUI's {what} needs {key} = {expected}, the file has {config[key]!r}. "
                "Train with that setting, or run the file with `distill sample`."
            )


def require_multiples(path: Path, what: str, channels: list[int]) -> None:
    if any(c % channels[0] for c in channels):
        need = f"needs channels that are multiples of the first, the file has {list(channels)}"
        raise CheckpointError(f"{path}: wrong architecture: ComfyUI's {what} {need}. Train with such channels.")
