"""`distill info`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Info:
    """Show what a file says about itself: a OneStep file whole, any other safetensors file by its header."""

    model: tyro.conf.Positional[str] = "student"
    """A safetensors file, or the bundled student or teacher."""


SHOWN = ("family", "method", "teacher", "prediction", "t_in", "steps", "guidance", "schedule", "latent", "metrics")


def run(o: Info) -> None:
    """Print it. Raises CheckpointError for what is no sound safetensors file."""
    from ..file.metadata import read_metadata
    from ..header import read_header
    from ..tutorial.bundled import find

    path = find(o.model)
    header = read_header(path)
    strings = header.pop("__metadata__", {})
    numbers = sum(math.prod(v["shape"]) for v in header.values())
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {len(header)} tensors, {numbers / 1e6:.2f} M numbers")
    if "onestep.version" not in strings:
        print("not a OneStep file; its metadata:" if strings else "not a OneStep file, and without metadata")
        for name, value in strings.items():
            print(f"{name:>12}  {value if len(value) < 200 else value[:200] + ' ...'}")
        return
    meta = read_metadata(path)
    for name in (*SHOWN, "config", *(["quantization"] if meta.quantization else []), "license"):
        value = getattr(meta, name)
        print(f"{name:>12}  {value if isinstance(value, str) else json.dumps(value)}")
