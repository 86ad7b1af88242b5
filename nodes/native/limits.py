"""What ComfyUI's classes cannot compute, said in the words of the file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...distill.file.metadata import CURE
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


@contextmanager
def sound(path: Path, what: str) -> Iterator[None]:
    """While a network is made on the meta device: what ComfyUI's class says of its arguments, however it says it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        problem = str(e).strip().splitlines()[:1] or [type(e).__name__]
        raise CheckpointError(
            f"{path}: wrong architecture: ComfyUI's {what} cannot be made: {problem[0]}. {CURE}"
        ) from e
