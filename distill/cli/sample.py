"""`distill sample`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Sample:
    """Make pictures from prompts with a OneStep file or a folder of diffusers'."""

    prompts: tyro.conf.Positional[list[str]]
    """What to draw; quote each prompt."""
    model: str = "student"
    """A OneStep file, a LoRA of one, a folder of diffusers', or the bundled student or teacher."""
    base: str | None = None
    """The model that a LoRA adds to. Default: the bundled one of that name."""
    out: Path = Path("samples.png")
    """One PNG, overwritten where it exists; the pictures stand side by side."""
    seed: int = 0
    steps: int | None = None
    """Default: what the file recommends."""
    guidance: float | None = None
    """A teacher's guidance; a student has it in its weights. Default: what the file recommends."""
    scale: int | None = None
    """Enlarge by this, pixel by pixel; 1 to 64. Default: small pictures to 256 pixels."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""


def run(o: Sample) -> None:
    """Write one picture of all samples. Raises ValueError for what cannot be, CheckpointError for a file."""
    from PIL import Image

    from ..checks import SEEDS, need, within
    from .console import open_model, writable

    need(len(o.prompts) > 0, "prompts", o.prompts, "give one or more, each in quotes")
    for prompt in o.prompts:  # bytes of the command line that are no UTF-8 come as surrogates
        need(not any("\ud800" <= c <= "\udfff" for c in prompt), "prompt", prompt, "not UTF-8 text")
    within(o, steps=(1, inf), guidance=(-inf, inf), scale=(1, 64), seed=SEEDS)
    kind = Image.registered_extensions().get(o.out.suffix.lower())
    need(kind in Image.SAVE, "out", str(o.out), "name a picture, such as samples.png")
    writable(o.out)
    import torch

    from ..atomic import write_beside
    from ..backbones.drawing import to_pil

    model = open_model(o.model, o.device, o.base)
    how = {"steps": o.steps, "guidance": o.guidance}
    images = to_pil(model.sample(o.prompts, torch.Generator().manual_seed(o.seed), **how))
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * width, 0))
    scale = o.scale or max(1, 256 // width)
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    write_beside(o.out, lambda temporary: sheet.save(temporary, kind))
    print(o.out)
