"""`distill demo`: a one-step student of the bundled teacher in about five minutes on two cores, and what it is worth.

Teacher pairs, regression on them, then VSD with a coach: the order that was best in prototypes. Each stage gets a share
of the time. Everything is written as it is made, so Ctrl-C leaves a student and `--resume` goes on.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..backbones.model import Model, load, save_student, weak_teacher
from ..cli.console import pick_device
from ..coach import CopyCoach, LoraCoach
from ..methods.regression import Pairs, Regression, RegressionOptions, build_pairs
from ..methods.vsd import VSD, VSDOptions
from ..sample import one_step
from ..training.loop import TrainOptions, seeded, train
from . import shapes
from .bundled import bundled
from .metrics import Judge, evaluate, print_table
from .prompts import shape_batches

LAW = VSDOptions(guidance=1.7, guidance_until=0.45, autoguidance=1.75)
"""What the student is drawn to. Guidance puts more pictures right, and all farther from real ones; autoguidance makes
them more diverse and nearer to real ones, and fewer of them clean. Found by single runs of `distill train --init ...
--vsd.guidance ... --vsd.autoguidance ...` from the same regression, measured by `distill eval`."""
SHARES = {"pairs": 0.16, "regression": 0.32, "vsd": 0.40}  # of the time; the rest is for measuring


@dataclass(frozen=True)
class Demo:
    """Train a one-step student from the bundled teacher with a coach, and compare the two."""

    minutes: float = 5.0
    """Time for everything, on two cores or one GPU."""
    out: Path = Path("onestep-demo")
    """Folder for student.safetensors, comparison.png, report.json, workflow.json and the logs."""
    seed: int = 0
    """Of every random number."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""
    resume: bool = False
    """Go on with a run in `out` that was stopped."""
    teacher: Path | None = None
    """A teacher file of the tutorial world. Default: the bundled one."""
    weak: Path | None = None
    """A worse version of the teacher, for autoguidance. Default: the bundled one's; none for a teacher of your own."""
    coach: Literal["lora", "copy"] = "copy"
    """lora: adapters on the frozen teacher (least memory); copy: a second net (at this size faster and as good)."""


def run(options: Demo) -> dict:
    """Run the demo and return what report.json holds. Raises FileExistsError for a folder that holds a run already."""
    out = options.out
    if (out / "student.safetensors").exists() and not options.resume:
        raise FileExistsError(
            f"{out} holds a run already: add --resume to go on with it, or name another folder by --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(options.device)
    teacher = load(options.teacher or bundled("teacher"), device)
    student = copy.deepcopy(teacher.unet).requires_grad_(True)
    print(f"teacher: {teacher.name} on {device}, seed {options.seed}, {options.minutes:g} minutes -> {out}/")

    latest: nn.Module = student

    def keep() -> None:
        save_student(out / "student.safetensors", teacher, latest, method="vsd", config=_plain(options))

    try:
        for average in _train(options, teacher, student, device):
            latest = average
    except KeyboardInterrupt:
        keep()
        print(
            f"\nStopped. {out}/student.safetensors is the student so far; go on with: distill demo --out {out} --resume"
        )
        raise
    keep()
    return finish(out, options)


def _train(options: Demo, teacher: Model, student: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Yields the averaged student after every step of every stage; `student` ends as the final average."""
    null = teacher.encode([""])
    g = one_step(teacher.wrap(student), teacher.denoiser.schedule.time(teacher.meta.t_in))

    law, weak = LAW, None
    if options.teacher is None or options.weak is not None:
        weak = weak_teacher(teacher, options.weak)
    else:  # the bundled one is a worse version of the bundled teacher only
        law = replace(LAW, autoguidance=1.0)
        print("no autoguidance: it needs a worse version of this teacher (--weak)")
    guidance = teacher.meta.guidance["scale"]
    minutes = {stage: share * options.minutes for stage, share in SHARES.items()}
    with quiet_bar() as bar:
        pairs = _pairs(options, teacher, null, RegressionOptions(guidance=guidance), 60 * minutes["pairs"], bar, device)
        common = dict(steps=None, seed=options.seed, device=device.type, save_every=50)
        first = TrainOptions(minutes=minutes["regression"], lr=1e-3, decay_from=0.4, **common)
        regression = Regression(RegressionOptions(guidance=guidance), g)
        where = options.out / "regression"
        for step in train(regression, student, None, pairs, first, where, resume=options.resume):
            bar("regression", step.progress, step.seconds, first.minutes, loss=step.logs["student_loss"])
            yield step.ema
        student.load_state_dict(step.ema.state_dict())

        second = TrainOptions(
            minutes=minutes["vsd"],
            lr=1e-4,
            coach_lr=2e-3 if options.coach == "lora" else 1e-3,
            coach_warmup=20,
            **common,
        )
        net = copy.deepcopy(teacher.unet)
        coach = CopyCoach(net, teacher.wrap) if options.coach == "copy" else LoraCoach(net, teacher.wrap, rank=32)
        vsd = VSD(law, g, coach, null, weak=weak)
        where = options.out / "vsd"
        for step in train(vsd, student, coach, shape_batches(teacher, 32), second, where, resume=options.resume):
            shown = {name: step.logs[name] for name in ("coach_loss", "rel_gap", "coach_ratio") if name in step.logs}
            bar("coach", step.progress, step.seconds, second.minutes, **shown)
            yield step.ema
        student.load_state_dict(step.ema.state_dict())


def _pairs(options: Demo, teacher: Model, null, how: RegressionOptions, seconds: float, bar, device) -> Pairs:
    """The teacher's pairs, from the run's folder if they are there."""
    path, batch = options.out / "pairs.safetensors", 32
    if options.resume and path.exists():
        stored = load_file(path, str(device))
        z, x0 = stored.pop("z"), stored.pop("x0")
        return Pairs(z, stored, x0, batch)
    pairs = build_pairs(
        teacher.denoiser,
        shape_batches(teacher, batch),
        how,
        seeded("cpu", options.seed, 1),
        null=null,
        seconds=seconds,
        progress=lambda n, passed: bar("teacher pairs", passed / seconds, passed, seconds / 60, pairs=n),
    )
    temporary = path.with_suffix(".tmp")
    save_file({"z": pairs.z, "x0": pairs.x0, **pairs.cond}, temporary)
    temporary.replace(path)
    return pairs


# ------------------------------------------------------------------------------------------------- what it is worth


def finish(out: Path, options: Demo) -> dict:
    """Measure the student, draw the comparison, write report.json and workflow.json, print the table."""
    device = pick_device(options.device)
    teacher, student = load(options.teacher or bundled("teacher"), device), load(out / "student.safetensors", device)
    judge = Judge.load()
    # The teacher's figures were made by `python -m distill.tutorial.build measure`: 50 steps take minutes.
    rows = {f"teacher, {name}": report for name, report in teacher.meta.metrics.items()}
    rows["student, 1 step"] = evaluate(lambda p, g: student.sample(p, g).cpu(), judge).to_dict()
    times = compare(teacher, student, out / "comparison.png", options.seed)
    report = {"seed": options.seed, "minutes": options.minutes, "seconds_per_image": times, "rows": rows}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    save_student(
        out / "student.safetensors", teacher, student.unet,
        method="vsd", metrics={"1 step": rows["student, 1 step"]}, config=_plain(options),
    )  # fmt: skip
    print_table(rows)
    write_workflow(out)
    print(f"\n{out}/comparison.png shows the three side by side; {out}/report.json holds the figures.")
    print(
        f"In ComfyUI: put {out}/student.safetensors into models/diffusion_models, drop {out}/workflow.json on the page."
    )
    return report


def compare(
    teacher: Model, student: Model, path: Path, seed: int, count: int = 6, repeats: int = 5
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
    prompts = [shapes.prompt(a) for a in attributes]
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


def write_workflow(out: Path) -> None:
    """A graph that loads student.safetensors, from the repository's own workflow."""
    source = Path(__file__).parents[2] / "workflows" / "one-step-text-to-image.json"
    if not source.exists():
        print(f"No workflow.json: {source} is not there (installed without the repository).")
        return
    graph = json.loads(source.read_text())
    for node in graph["nodes"]:
        if node["type"] == "OneStepLoadStudent":
            node["widgets_values"][0] = "student.safetensors"
    (out / "workflow.json").write_text(json.dumps(graph, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------------- the rest


@contextmanager
def quiet_bar() -> Iterator:
    """One tqdm bar a stage, in seconds, so that its ETA is the stage's."""
    bars: dict[str, tqdm] = {}

    def show(stage: str, progress: float, seconds: float, minutes: float, **numbers: float) -> None:
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            layout = "{desc:<14}{percentage:3.0f}%|{bar:24}| {elapsed} left {remaining}{postfix}"
            bars[stage] = tqdm(total=1.0, desc=stage, bar_format=layout, mininterval=0.5)
        bars[stage].set_postfix({k: f"{v:.4g}" for k, v in numbers.items()}, refresh=False)
        bars[stage].update(min(1.0, progress) - bars[stage].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def _plain(options: Demo) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
