"""`distill sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Sample:
    """Make pictures from prompts with a OneStep file or a folder of diffusers'."""

    prompts: tyro.conf.Positional[list[str]]
    """What to draw; quote each prompt."""
    model: str = "student"
    """A OneStep file, a folder of diffusers', or the bundled student or teacher."""
    out: Path = Path("samples.png")
    """One PNG, overwritten where it exists; the pictures stand side by side."""
    seed: int = 0
    steps: int | None = None
    """Default: what the file recommends."""
    guidance: float | None = None
    """A teacher's guidance; a student has it in its weights. Default: what the file recommends."""
    scale: int = 4
    """Enlarge by this, pixel by pixel."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""


def run(o: Sample) -> None:
    """Write one picture of all samples. Raises ValueError for what cannot be, CheckpointError for a file."""
    from ..checks import need

    need(len(o.prompts) > 0, "prompts", o.prompts, "give one or more, each in quotes")
    need(all(p.isprintable() for p in o.prompts), "prompts", o.prompts, "not UTF-8 text")
    need(o.steps is None or o.steps >= 1, "steps", o.steps, "1 or more")
    need(o.guidance is None or abs(o.guidance) < float("inf"), "guidance", o.guidance, "a number")
    need(o.scale >= 1, "scale", o.scale, "1 or more")
    import torch
    from PIL import Image

    from ..backbones import load
    from ..backbones.base import to_pil
    from ..tutorial.bundled import find
    from .console import pick_device

    model = load(find(o.model), pick_device(o.device))
    how = {"steps": o.steps, "guidance": o.guidance}
    images = to_pil(model.sample(o.prompts, torch.Generator().manual_seed(o.seed), **how))
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * width, 0))
    o.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * o.scale, sheet.height * o.scale), Image.Resampling.NEAREST).save(o.out)
    print(o.out)
