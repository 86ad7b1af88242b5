"""The demo: a one-step student of the bundled teacher in about five minutes on two cores, and how the two compare.

Teacher pairs, regression on them, then VSD with a coach: the order that was best. Each stage gets a share
of the time. Everything is written as it is made, so that a stopped demo goes on.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..denoiser import Denoiser
from ..methods.base import Told
from ..methods.regression import RegressionOptions
from ..methods.vsd import VSDOptions
from ..training.loop import seeded
from ..training.options import TrainOptions
from ..training.state import Step
from ..training.students import train_student
from . import shapes
from .prompts import shape_batches

LAW = {"guidance": 1.7, "guidance_until": 0.45, "autoguidance": 1.25}
"""What the student is drawn to. Guidance puts more pictures right, and all farther from real ones and more alike; so it
ends where noise is heaviest. A little autoguidance brings them nearer to real ones; too much of it, or away from a
teacher that is far worse, overshoots."""
SHARES = {"pairs": 0.16, "regression": 0.32, "vsd": 0.40}  # of the time; the rest is for measuring
BATCH = 32


def stages(
    teacher: Backbone,
    out: Path,
    *,
    minutes: float = 5.0,
    seed: int = 0,
    coach: Literal["lora", "copy"] = "copy",
    weak: Denoiser | None = None,
    resume: bool = False,
    told: Told = lambda what, share, **numbers: None,
) -> Iterator[Step]:
    """Every step of the two trainings, the last one's average being the student. Without `weak`, no autoguidance.

    told(stage, share) is called along the way. Raises Diverged, and FileExistsError where `out` holds a run already.
    """
    time_for = {stage: share * minutes for stage, share in SHARES.items()}
    common = {"steps": None, "seed": seed, "save_every": 50}
    batches = shape_batches(teacher, BATCH)
    how = {"weak": weak, "resume": resume, "told": told}

    law = LAW if weak is not None else LAW | {"autoguidance": 1.0}
    regression = RegressionOptions(**law, pairs=None, pairs_minutes=time_for["pairs"])
    training = TrainOptions(minutes=time_for["regression"], decay_from=0.4, **common)
    for step in train_student(teacher, regression, batches, training, out / "regression", **how):
        told("regression", step.progress, **step.logs)
        yield step

    vsd = VSDOptions(**law, coach=coach, rank=32, lr=1e-4, coach_warmup=20)
    training = TrainOptions(minutes=time_for["vsd"], **common)
    net = copy.deepcopy(step.ema)
    for step in train_student(teacher, vsd, batches, training, out / "vsd", net=net, **how):
        told("coach", step.progress, **step.logs)
        yield step


# ------------------------------------------------------------------------------------------------- what it is worth


def compare(
    teacher: Backbone, student: Backbone, path: Path, seed: int, count: int = 6, repeats: int = 5
) -> dict[str, float]:
    """Draw the same prompts and noise three ways, and time each way for one picture (medians, taken in turn)."""
    ways = {
        f"teacher, {teacher.meta.steps} steps": lambda p, g: teacher.sample(p, g).cpu(),
        "teacher, 1 step": lambda p, g: teacher.sample(p, g, steps=1).cpu(),
        "student, 1 step": lambda p, g: student.sample(p, g).cpu(),
    }
    g = seeded("cpu", seed, 2)
    attributes = shapes.sample_attributes(count, g)
    attributes[:, 0] = torch.arange(count) % 6  # every shape once
    attributes[:, 1] = torch.where(shapes.is_valid(attributes), attributes[:, 1], 0)
    stated = torch.ones(count, len(shapes.NAMES), dtype=torch.bool)
    stated[1::2, 2:] = False  # every other prompt leaves most open: there the teacher's one step is a blur
    prompts = [shapes.prompt(a, s) for a, s in zip(attributes, stated)]
    images = {name: way(prompts, seeded("cpu", seed, 3)) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way(prompts[:1], seeded("cpu", seed, 4))
            taken[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(t) for name, t in taken.items()}
    draw_sheet(prompts, images, {name: f"{1000 * s:.0f} ms an image" for name, s in seconds.items()}, path)
    return seconds


def draw_sheet(prompts: list[str], columns: dict[str, Tensor], below: dict[str, str], path: Path) -> None:
    """A picture with one row per prompt, one column per way of making it, and a word below each column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * len(columns) + 2.6, 1.55 * len(prompts) + 0.5), dpi=100, layout="constrained")
    axes = figure.subplots(len(prompts), len(columns), squeeze=False)
    for j, (caption, images) in enumerate(columns.items()):
        for i, image in enumerate(images):
            axes[i][j].imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).cpu(), interpolation="nearest")
            axes[i][j].set(xticks=[], yticks=[])
            axes[i][j].spines[:].set_visible(False)
        axes[0][j].set_title(caption, fontsize=9)
        axes[-1][j].set_xlabel(below[caption], fontsize=9)
    for i, text in enumerate(prompts):
        words = text.replace(" on ", "\non ").replace(", ", ",\n")
        axes[i][0].set_ylabel(words, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.savefig(path)
