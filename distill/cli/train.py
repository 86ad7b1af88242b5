"""`distill train`: a one-step student from any OneStep teacher file, by any method in `methods/`."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn
from tqdm import tqdm

from ..backbones.model import Model, load, save_student, weak_teacher
from ..coach import CopyCoach, LoraCoach
from ..methods.regression import Regression, RegressionOptions, build_pairs
from ..methods.sds import SDS, SDSOptions
from ..methods.vsd import VSD, VSDOptions
from ..sample import one_step
from ..training.loop import Step, TrainOptions, seeded, train
from ..training.prompts import prompt_batches, read_prompts
from ..tutorial.bundled import bundled
from ..tutorial.prompts import shape_batches
from .console import pick_device


@dataclass(frozen=True)
class Train:
    """Train a one-step student. Ctrl-C leaves a student; the same command with --resume goes on."""

    out: Path
    """Folder for student.safetensors, log.csv, TensorBoard files and checkpoints."""
    teacher: Path | None = None
    """A OneStep teacher file. Default: the bundled one."""
    weak: Path | None = None
    """A worse teacher of the same kind, for --vsd.autoguidance. Default: an early checkpoint of the bundled teacher."""
    init: Path | None = None
    """A OneStep file to start the student from, such as the student of a regression. Default: the teacher."""
    method: Literal["vsd", "sds", "regression"] = "vsd"
    """vsd: with a coach. sds: without one, to see it collapse. regression: on teacher pairs, a good start for vsd."""
    prompts: Path | None = None
    """A text file with one prompt a line. Default: the tutorial world's."""
    batch_size: int = 32
    t_in: float | None = None
    """The timestep the student is called at, as the net counts them. Default: the teacher's noisiest. DMD2: 399."""
    coach: Literal["lora", "copy"] = "lora"
    """lora: adapters on the frozen teacher, least memory (SwiftBrush). copy: a second net, better and often faster."""
    rank: int = 64
    """Of the LoRA coach (SwiftBrush 64)."""
    pairs: int = 4096
    """Teacher pairs for the regression."""
    device: str = "auto"
    resume: bool = False
    """Go on with the run in `out`."""
    training: TrainOptions = field(default_factory=TrainOptions)
    vsd: VSDOptions = field(default_factory=VSDOptions)
    sds: SDSOptions = field(default_factory=SDSOptions)
    regression: RegressionOptions = field(default_factory=RegressionOptions)


def run(o: Train) -> Path:
    """Train, write out/student.safetensors, return its path. Raises CheckpointError, Diverged, FileExistsError."""
    device = pick_device(o.device)
    teacher = load(o.teacher or bundled("teacher"), device)
    student = load(o.init, device).unet if o.init else copy.deepcopy(teacher.unet)
    student.requires_grad_(True)
    t_in = teacher.meta.t_in if o.t_in is None else o.t_in
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(o).items()}
    latest = None
    try:
        for step in steps(o, teacher, student, t_in, device):
            latest = step.ema
    except KeyboardInterrupt:
        print(f"\nStopped. {o.out}/student.safetensors is the student so far; the same command with --resume goes on.")
        raise
    finally:
        if latest is not None:
            save_student(o.out / "student.safetensors", teacher, latest, method=o.method, t_in=t_in, config=config)
    print(o.out / "student.safetensors")
    return o.out / "student.safetensors"


def steps(o: Train, teacher: Model, student: nn.Module, t_in: float, device):
    """The loop, with a progress bar."""
    null = teacher.encode([""])
    g = one_step(teacher.wrap(student), teacher.denoiser.schedule.time(t_in))

    batches = shape_batches(teacher, o.batch_size)
    if o.prompts:
        batches = prompt_batches(teacher, read_prompts(o.prompts), o.batch_size)
    coach = None
    if o.method == "regression":
        how = {"null": null, "count": o.pairs}
        with tqdm(total=o.pairs, desc="teacher pairs") as bar:
            drawn = build_pairs(
                teacher.denoiser, batches, o.regression, seeded("cpu", o.training.seed, 1),
                progress=lambda n, _: bar.update(n - bar.n), **how,
            )  # fmt: skip
        method, batches = Regression(o.regression, g), drawn
    elif o.method == "sds":
        weak = weak_teacher(teacher, o.weak) if o.sds.autoguidance != 1 else None
        method = SDS(o.sds, g, CopyCoach(teacher.unet, teacher.wrap), null, weak=weak)  # only the teacher is called
    else:
        net = copy.deepcopy(teacher.unet)
        coach = CopyCoach(net, teacher.wrap) if o.coach == "copy" else LoraCoach(net, teacher.wrap, rank=o.rank)
        weak = weak_teacher(teacher, o.weak) if o.vsd.autoguidance != 1 else None
        method = VSD(o.vsd, g, coach, null, weak=weak)
    with tqdm(
        total=1.0, desc=o.method, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    ) as bar:
        for step in train(method, student, coach, batches, o.training, o.out, resume=o.resume):
            show(bar, step)
            yield step


def show(bar: tqdm, step: Step) -> None:
    names = ("student_loss", "coach_loss", "rel_gap", "coach_ratio", "x_std")
    bar.set_postfix({k: f"{step.logs[k]:.4g}" for k in names if k in step.logs}, refresh=False)
    bar.update(step.progress - bar.n)
