"""`distill info`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import tyro


@dataclass(frozen=True)
class Info:
    """Show what a file says about itself: a OneStep file or folder, or by its header any other safetensors file."""

    model: tyro.conf.Positional[str] = "student"
    """A safetensors file, a student's folder, or the bundled student or teacher."""


FIELDS = (
    "base", "part", "rank", "alpha", "family", "method", "teacher", "prediction", "t_in", "steps", "times",
    "guidance", "schedule", "latent", "metrics", "config", "quantization", "license",
)  # fmt: skip
"""Of a OneStep file, or a LoRA. What is left out is long: the architecture, the tokenizer, the workflow."""


def run(o: Info) -> None:
    """Print it. Raises CheckpointError for what is no sound safetensors file."""
    from ..header import LORA, CheckpointError, read_header
    from ..tutorial.bundled import find

    path = find(o.model)
    if path.is_dir():
        from ..backbones.folder import read_ours

        if (meta := read_ours(path)) is None:
            raise CheckpointError(f"{path}: a folder. Name a safetensors file in it.")
        print(f"{path}: a diffusers folder with OneStep's metadata")
        show(meta.to_strings(), FIELDS)
        return
    header = read_header(path)
    said = header.pop("__metadata__", {})
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {held(header)}")
    ours = "onestep.version" in said or LORA in said
    if not ours:
        print("not a OneStep file; its metadata:" if said else "not a OneStep file, and without metadata")
    show(said, FIELDS if ours else tuple(said), math.inf if ours else 200)


def show(said: dict[str, str], names: tuple[str, ...], most: float = math.inf) -> None:
    """Those of the names that are there, a line each."""
    for name in (n for n in names if n in said):
        print(f"{plain(name):>12}  {plain(said[name], most)}")


def held(entries: dict[str, Any]) -> str:
    """How many tensors and numbers, by type."""
    count: Counter[str] = Counter()
    for entry in entries.values():
        count[entry["dtype"]] += math.prod(entry["shape"])
    kinds = ", ".join(f"{plain(kind)} {numbers / 1e6:.2f} M" for kind, numbers in count.most_common())
    return f"{len(entries)} tensors, {count.total() / 1e6:.2f} M numbers ({kinds})"


def plain(text: str, most: float = 200) -> str:
    """Text of a stranger's file in one line: control characters, which a terminal would obey, as escapes."""
    text = text if len(text) <= most else f"{text[: int(most)]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
