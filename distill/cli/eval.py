"""`distill eval`: what a model is worth, by the tutorial's judge, or by FID, KID and CLIP on prompts of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..backbones.base import Backbone

BATCH = 128
"""Pictures of the tutorial world at once; the noise is the same for any number that `Backbone.sample` takes at once."""


@dataclass(frozen=True)
class Eval:
    """Measure a model. Without --prompts, of the tutorial world: accuracy, Frechet distance, style, entropy, what is
    left over, cleanness; the rows of the bundled teacher come from its file. With --prompts, any model: seconds a
    picture; FID and KID with --reference and --inception; CLIP score with --clip; diversity with either net.
    """

    model: str = "student"
    """A OneStep file, a LoRA of one, a folder of diffusers', or the bundled student or teacher."""
    base: str | None = None
    """The model that a LoRA adds to. Default: the bundled one of that name."""
    prompts: str | None = None
    """What to draw, as for distill train: a file of prompts, or a dataset."""
    column: str | None = None
    """The column of the prompts."""
    reference: Path | None = None
    """A folder of real pictures, or an .npz with mu and sigma of their features."""
    inception: Path | None = None
    """inception-2015-12-05.pt, the TorchScript net that FID and KID are defined by."""
    clip: Path | None = None
    """A folder of transformers' CLIPModel, such as openai/clip-vit-large-patch14."""
    n: int = 1024
    """Pictures behind accuracy, Frechet distance, FID, KID and CLIP score. Compare only figures of equal n."""
    steps: int | None = None
    guidance: float | None = None
    seed: int = 1234
    """The first seed."""
    seeds: int = 3
    """Tutorial world: how many seeds; the table shows their mean and half the distance between the extremes."""
    batch_size: int = 8
    """With --prompts: pictures at once."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    force: bool = False
    """Overwrite `out` where it exists."""
    device: str = "auto"


def run(o: Eval) -> dict[str, dict]:
    """Measure, print, return the figures. Raises CheckpointError for a file that is none of ours, ValueError for a
    model or a net that does not fit."""
    from ..checks import SEEDS, need, within
    from .console import refuse_existing, writable, write_json

    within(o, n=(16, inf), seeds=(1, inf), steps=(1, inf), guidance=(-inf, inf), seed=SEEDS, batch_size=(1, inf))
    if o.out:
        writable(o.out, ending=".json")
        refuse_existing(o.out, o.force)
    both = (o.reference is None) == (o.inception is None)
    need(both, "reference, inception", (o.reference, o.inception), "give both for FID and KID, or neither")
    alone = o.prompts is not None or (o.reference is None and o.clip is None)
    need(alone, "prompts", None, "--reference, --inception and --clip need --prompts to draw")
    found = in_general(o) if o.prompts is not None else in_the_tutorial(o)
    if o.out:
        write_json(o.out, found)
    return found


def opened(o: Eval) -> Backbone:
    """The model. Raises ValueError where it takes no guidance."""
    from ..checks import need
    from .console import open_model

    model = open_model(o.model, o.device, o.base)
    baked = o.guidance is not None and model.meta.guidance.get("baked")
    need(not baked, "guidance", o.guidance, f"{model.name} is a student, its guidance is in its weights")
    return model


def in_general(o: Eval) -> dict[str, Any]:
    """Figures of any model on the prompts, and the protocol."""
    from ..evaluation.extractors import Clip, Inception
    from ..evaluation.run import Measure, reference
    from ..training.prompts import read_prompts
    from .console import bars, pick_device

    prompts, device = read_prompts(o.prompts, o.column), pick_device(o.device)
    inception = Inception(o.inception, device) if o.inception else None
    clip = Clip(o.clip, device) if o.clip else None
    model = opened(o)
    with bars() as told:
        real = reference(o.reference, inception, o.batch_size, told) if inception else None
        how = {"n": o.n, "seed": o.seed, "batch": o.batch_size, "told": told}
        found = Measure(model, prompts, inception, clip, real, **how).run(steps=o.steps, guidance=o.guidance)
    print("\n".join(f"{name:<20}{value:.6g}" for name, value in found["figures"].items()))
    return found


def in_the_tutorial(o: Eval) -> dict[str, dict]:
    """Rows of the tutorial's figures: the model, its teacher, what no generator of its latents can pass."""
    import torch

    from ..checks import need
    from ..file.metadata import read_metadata
    from ..tutorial.bundled import bundled
    from ..tutorial.metrics import Judge, evaluate_seeds, pictures
    from ..tutorial.prompts import speaks
    from ..tutorial.rows import floors, print_table
    from .console import bars

    model, judge = opened(o), Judge.load()
    need(speaks(model), "model", model.name, "not of the tutorial world: give --prompts, and see --help for the rest")
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
    return rows


def steps_of(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
