"""`distill train vsd|sds|regression`: a one-step student from any teacher, by any method in `methods/`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from ..methods import METHODS
from ..training.options import TrainOptions


@dataclass(frozen=True)
class Run:
    out: Path
    """Folder for student.safetensors (or student/, for a teacher without OneStep files, such as SDXL), log.csv,
    TensorBoard files and checkpoints."""
    teacher: str = "teacher"
    """The bundled teacher, a OneStep file, or a folder of diffusers'."""
    weak: str | None = None
    """A worse teacher of the same kind, for --autoguidance. Default: an early checkpoint of the bundled teacher."""
    init: str | None = None
    """A OneStep file to start the student from, such as the student of a regression. Default: the teacher."""
    prompts: str | None = None
    """A .txt with one prompt a line, a .jsonl, .csv or .parquet, or the name of a Hugging Face dataset. Default, for
    teachers of the tutorial world: that world's."""
    column: str | None = None
    """The column of the prompts. Default: prompt, caption, text or description, or the only one with text."""
    cache: Path | None = None
    """Folder for encoded prompts, where other runs with these prompts and text encoders find them; it may be removed
    between runs. Default: `cache` in `out`."""
    batch_size: int = 32
    t_in: float | None = None
    """The timestep the student is called at, as the net counts them. Default: the teacher's noisiest. DMD2: 399."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""
    resume: bool = False
    """Go on with the run in `out`."""
    force: bool = False
    """Overwrite a student that is in `out` without its run."""
    training: tyro.conf.OmitArgPrefixes[TrainOptions] = field(default_factory=TrainOptions)


def _command(name: str, options: type) -> type:
    """The dataclass of `distill train NAME`: a run's options and the method's."""
    of_method = ("options", tyro.conf.OmitArgPrefixes[options], field(default_factory=options))
    made = make_dataclass(f"Train_{name}", [of_method], bases=(Run,), frozen=True)
    made.method, made.__doc__ = name, sys.modules[options.__module__].__doc__.splitlines()[0]
    return Annotated[made, tyro.conf.subcommand(name)]


COMMANDS = {name: _command(name, options) for name, options in METHODS.items()}


@dataclass(frozen=True)
class Train:
    """Train a one-step student. Ctrl-C leaves a student; the same command with --resume goes on."""

    how: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Union[tuple(COMMANDS.values())]]]  # noqa: UP007
    """The method."""


def run(o: Train) -> Path:
    """Train, write the student into out, return its path. Raises CheckpointError, Diverged, FileExistsError."""
    return train(o.how)


def train(o: Run) -> Path:
    """As `run`, from one of COMMANDS' dataclasses."""
    import torch

    from ..backbones import load
    from ..backbones.base import weaker
    from ..checks import need
    from ..header import CheckpointError
    from ..training.batches import prompt_batches, prompt_rows
    from ..training.prompts import read_prompts
    from ..training.students import train_student
    from ..tutorial.bundled import find
    from ..tutorial.prompts import shape_batches, speaks
    from .console import bars, is_main_process, open_teacher, refuse_run, writable

    need(o.batch_size >= 1, "batch-size", o.batch_size, "1 or more")
    writable(o.out, folder=True)
    refuse_run(o.out, [o.out], o.resume, o.force)
    prompts = read_prompts(o.prompts, o.column) if o.prompts else None
    teacher = open_teacher(o.teacher, o.device)
    file = teacher.student_path(o.out / "student.safetensors")
    teacher.time(o.t_in)
    if prompts is None and not speaks(teacher):
        raise ValueError(f"{teacher.name} is not of the tutorial world: give --prompts, a file with one prompt a line")
    weak = None
    if getattr(o.options, "autoguidance", 1.0) != 1:
        if o.weak is None and o.teacher != "teacher":
            raise ValueError("autoguidance needs --weak, a worse version of the teacher, such as an early checkpoint")
        weak = weaker(teacher, load(find(o.weak or "weak"), teacher.device))
    net = None
    if o.init is not None:
        net = load(find(o.init), teacher.device).net
        ours, theirs = ({k: v.shape for k, v in n.state_dict().items()} for n in (teacher.net, net))
        if ours != theirs:
            raise CheckpointError(f"{o.init}: another architecture than {teacher.name}'s. Start from one of its kind.")
    t_in = teacher.meta.t_in if o.t_in is None else o.t_in
    guidance = {"scale": getattr(o.options, "guidance", 1.0), "baked": True}
    about = {"method": o.method, "t_in": t_in, "guidance": guidance, "config": plain(o)}
    if teacher.in_comfyui:
        about["workflow"] = teacher.graph(file, prompts and prompts[0])
    step = None
    try:
        with bars() as told:
            if prompts is None:
                batches = shape_batches(teacher, o.batch_size)
            else:
                half = torch.bfloat16 if o.training.precision == "bf16" else None
                rows = prompt_rows(teacher, prompts, o.cache or o.out / "cache", half, told)
                batches = prompt_batches(teacher, rows, o.batch_size)
            how = {"net": net, "t_in": o.t_in, "weak": weak, "resume": o.resume, "identity": identity(o, t_in)}
            for step in train_student(teacher, o.options, batches, o.training, o.out, **how, told=told):
                told(o.method, step.progress, **step.logs)
    except KeyboardInterrupt:
        left = "nothing to keep yet" if step is None and not file.exists() else f"{file} is the student so far"
        print(f"\nStopped: {left}; the same command with --resume goes on.")
        raise
    finally:
        if step is not None and is_main_process():
            teacher.save_student(file, step.ema, **about)
    print(file)
    return file


def identity(o: Run, t_in: float) -> dict[str, Any]:
    """What makes a run the run it is: a resume with another one is refused."""
    fixed = {name: getattr(o.options, name) for name in ("coach", "rank") if hasattr(o.options, name)}
    names = {name: Path(p).name if (p := getattr(o, name)) else None for name in ("teacher", "init", "weak")}
    return {**names, "t_in": t_in, **fixed}


def plain(o: Run) -> dict[str, Any]:
    """The options for metadata: files by name alone, nothing of the machine."""
    found: dict[str, Any] = {}
    for f in fields(o):
        value = getattr(o, f.name)
        if is_dataclass(value):
            found |= asdict(value)
        elif f.name in ("teacher", "weak", "init", "prompts"):
            found[f.name] = Path(value).name if value else None
        elif f.name not in ("out", "cache", "device", "resume", "force"):
            found[f.name] = value
    return found
