"""With a coach and without, on the same budget from the same start: docs/coach.png, docs/coach.json.

    python benchmarks/coach_or_not.py

Three students of the bundled teacher, each `--minutes` long from the teacher's own weights: VSD with a coach, SDS (no
coach), regression on teacher pairs. One prompt with many noises shows what the figures say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from distill.backbones import load
from distill.methods.regression import RegressionOptions
from distill.methods.sds import SDSOptions
from distill.methods.vsd import VSDOptions
from distill.training.options import TrainOptions
from distill.training.students import train_student
from distill.tutorial.bundled import bundled
from distill.tutorial.metrics import Judge, evaluate
from distill.tutorial.prompts import shape_batches


@dataclass(frozen=True)
class Options:
    minutes: float = 3.0
    out: Path = Path("runs/coach")
    docs: Path = Path("docs")
    prompts: tuple[str, ...] = ("a large star", "a small red ring on a blue background, top left")


LAW = {"guidance": 2.0, "guidance_until": 0.45, "lr": 2e-4}
METHODS = {  # VSD and SDS differ in the coach alone
    "vsd": (VSDOptions(**LAW, coach="copy", coach_warmup=20), {}),
    "sds": (SDSOptions(**LAW), {}),
    "regression": (RegressionOptions(), {"decay_from": 0.4}),
}
NAMES = {"vsd": "VSD, with a coach", "sds": "SDS, no coach", "regression": "regression on pairs"}


def main(o: Options) -> None:
    judge, rows, images = Judge.load(), {}, {}
    for method, (options, how) in METHODS.items():
        file = o.out / method / "student.safetensors"
        if not file.exists():
            teacher, training = load(bundled("teacher")), TrainOptions(steps=None, minutes=o.minutes, **how)
            *_, last = train_student(teacher, options, shape_batches(teacher, 32), training, file.parent)
            teacher.save_student(file, last.ema, method=method)
        student = load(file)
        rows[NAMES[method]] = evaluate(student.sample, judge).to_dict()
        images[NAMES[method]] = [student.sample([p] * 12, torch.Generator().manual_seed(1)) for p in o.prompts]
        print(NAMES[method], rows[NAMES[method]], flush=True)
    teacher = load(bundled("teacher"))
    name = f"teacher, {teacher.meta.steps} steps"
    rows = {name: teacher.meta.metrics[f"{teacher.meta.steps} steps"]} | rows
    images = {name: [teacher.sample([p] * 12, torch.Generator().manual_seed(1)) for p in o.prompts]} | images
    o.docs.mkdir(parents=True, exist_ok=True)
    (o.docs / "coach.json").write_text(json.dumps({"minutes": o.minutes, "rows": rows}, indent=2) + "\n")
    draw(images, o.prompts, o.docs / "coach.png")


def draw(images: dict[str, list[torch.Tensor]], prompts: tuple[str, ...], path: Path) -> None:
    """One row per student, one block of 2 x 6 pictures per prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(prompts) + 1.6, 1.2 * len(images) + 0.4), dpi=100, layout="constrained")
    axes = figure.subplots(len(images), len(prompts), squeeze=False)
    for i, (name, blocks) in enumerate(images.items()):
        for j, block in enumerate(blocks):
            strip = torch.cat([torch.cat(list(row), 2) for row in block.split(6)], 1)
            axes[i][j].imshow(((strip.permute(1, 2, 0) + 1) / 2).clamp(0, 1), interpolation="nearest")
            axes[i][j].set(xticks=[], yticks=[])
            axes[i][j].spines[:].set_visible(False)
            if i == 0:
                axes[i][j].set_title(prompts[j], fontsize=9)
        axes[i][0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.savefig(path)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
