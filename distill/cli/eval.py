"""`distill eval`: what a model of the tutorial world is worth, beside its teacher, its law and real pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import inf
from pathlib import Path

BATCH = 128
"""Pictures at once; the noise is the same for any number that `Backbone.sample` takes at once too."""


@dataclass(frozen=True)
class Eval:
    """Measure a model of the tutorial world: accuracy, Frechet distance, style, entropy, what is left over, cleanness.

    The rows of the bundled teacher come from its file, the others are measured.
    """

    model: str = "student"
    """A OneStep safetensors file, or the bundled student or teacher."""
    n: int = 1024
    """Pictures behind accuracy and the Frechet distance. Compare only figures of equal n."""
    steps: int | None = None
    guidance: float | None = None
    seed: int = 1234
    """The first seed."""
    seeds: int = 3
    """How many seeds; the table shows their mean and half the distance between the extremes."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    device: str = "auto"


def run(o: Eval) -> dict[str, dict]:
    """Measure, print the table, return its rows. Raises CheckpointError for a file that is none of ours, ValueError for
    a model of another world."""
    from ..atomic import replace
    from ..checks import SEEDS, need, within
    from .console import bars, pick_device, writable

    within(o, n=(16, inf), seeds=(1, inf), steps=(1, inf), guidance=(-inf, inf), seed=SEEDS)
    if o.out:
        writable(o.out)
    import torch

    from ..backbones import load
    from ..file.metadata import read_metadata
    from ..tutorial.bundled import bundled, find
    from ..tutorial.metrics import Judge, evaluate_seeds, pictures
    from ..tutorial.prompts import speaks
    from ..tutorial.rows import floors, print_table

    model, judge = load(find(o.model), pick_device(o.device)), Judge.load()
    need(speaks(model), "model", model.name, "not of the tutorial world, whose judge cannot read its pictures")
    baked = o.guidance is not None and model.meta.guidance.get("baked")
    need(not baked, "guidance", o.guidance, f"{model.name} is a student, its guidance is in its weights")

    made, total = 0, o.seeds * pictures(o.n)
    how = {"n": o.n, "seeds": o.seeds, "first": o.seed}
    with bars() as told:

        def generate(prompts: list[str], generator: torch.Generator) -> torch.Tensor:
            nonlocal made
            images = []
            for i in range(0, len(prompts), BATCH):
                some = prompts[i : i + BATCH]
                images.append(model.sample(some, generator, steps=o.steps, guidance=o.guidance).cpu())
                made += len(some)
                told("pictures", made / total)
            return torch.cat(images)

        rows = {f"{model.name}, {steps_of(o.steps or model.meta.steps)}": evaluate_seeds(generate, judge, **how)}
    if model.meta.teacher == bundled("teacher").name:
        rows |= {f"teacher, {name}": row for name, row in read_metadata(bundled("teacher")).metrics.items()}
    rows |= floors(model, judge, **how)
    print_table(rows)
    if o.out:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        replace(o.out, (json.dumps(rows, indent=2) + "\n").encode())
    return rows


def steps_of(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
