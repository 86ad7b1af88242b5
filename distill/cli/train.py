"""`distill train vsd|sds|regression`: a one-step student from any teacher, by any method in `methods/`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro

from ..methods import METHODS
from ..student import StudentOptions
from ..training.options import TrainOptions

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..denoiser import Cond, Denoiser
    from ..methods.base import Batches

SHOWN = 8
"""Prompts on a sheet: the first ones."""


@dataclass(frozen=True)
class Run:
    out: Path
    """Folder for student.safetensors (or student/, for a teacher without OneStep files, such as SDXL), log.csv,
    TensorBoard files, sheets of pictures and checkpoints."""
    teacher: str = "teacher"
    """The bundled teacher, a OneStep file, a folder of diffusers', or a model of the Hugging Face hub, org/model."""
    weak: str | None = None
    """A worse teacher of the same kind, for --autoguidance. Default: an early checkpoint of the bundled teacher."""
    init: str | None = None
    """A model to start the student from, such as the student of a regression, full or LoRA. Default: the teacher."""
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
    frozen: Literal["float32", "bfloat16"] = "float32"
    """How weights that are not trained are held; those that are trained are in float32 always."""
    aside: str | None = None
    """The device of text encoders and VAE, which are not trained; cpu leaves a GPU to the nets. Default: `device`."""
    resume: bool = False
    """Go on with the run in `out`."""
    force: bool = False
    """Overwrite a student that is in `out` without its run."""
    dry_run: bool = False
    """Only tell what it would take: parameters, memory by part with a step measured, and options that make it fit. The
    exit code is 1 where it does not fit. Nothing is written."""
    form: tyro.conf.OmitArgPrefixes[StudentOptions] = field(default_factory=StudentOptions)
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
    """Train, write the student into `out`, return its path. Raises CheckpointError, Diverged, FileExistsError."""
    return train(o.how)


def train(o: Run) -> Path:
    """As `run`, from one of COMMANDS' dataclasses."""
    from ..checks import need
    from ..training.prompts import read_prompts
    from ..training.sharding import whole
    from ..training.sheets import sheets
    from ..training.students import train_student
    from .console import bars, is_main_process, refuse_run, writable

    need(o.batch_size >= 1, "batch-size", o.batch_size, "1 or more")
    writable(o.out, folder=True)
    refuse_run(o.out, [o.out], o.resume or o.dry_run, o.force or o.dry_run)
    prompts = read_prompts(o.prompts, o.column) if o.prompts else None
    teacher, weak, start, base = opened(o, prompts is not None)
    if o.dry_run:
        return try_dry(o, teacher, weak, start, prompts)
    file = o.out / "student.safetensors"
    if o.form.student == "full":
        file = teacher.student_path(file)
    t_in = teacher.meta.t_in if o.t_in is None else o.t_in
    guidance = {"scale": getattr(o.options, "guidance", 1.0), "baked": True}
    about = {"method": o.method, "t_in": t_in, "guidance": guidance, "config": plain(o)}
    if o.form.student_then:
        about |= {"steps": 1 + len(o.form.student_then), "times": [t_in, *o.form.student_then]}
    teacher.check_student(lora=o.form.student == "lora", **about)
    if teacher.in_comfyui:
        about["workflow"] = teacher.graph(file, prompts and prompts[0])
    step = None
    try:
        with bars() as told:
            batches, shown = source(o, teacher, prompts, told)
            sheet = sheets(teacher, shown, [t_in, *o.form.student_then], o.training.seed)
            how = {"t_in": o.t_in, "weak": weak, "resume": o.resume, "identity": identity(o, t_in), "told": told}
            how |= {"student": o.form, "sheet": sheet, **start}
            for step in train_student(teacher, o.options, batches, o.training, o.out, **how):
                told(o.method, step.progress, **step.logs)
    except KeyboardInterrupt:
        left = "nothing to keep yet" if step is None and not file.exists() else f"{file} is the student so far"
        print(f"\nStopped: {left}; the same command with --resume goes on.")
        raise
    finally:
        if step is not None and (ema := whole(step.ema, is_main_process())) is not None and is_main_process():
            teacher.save_student(file, ema, base=base, **about)
    print(file)
    return file


def opened(o: Run, prompted: bool) -> tuple[Backbone, Denoiser | None, dict[str, Any], str]:
    """(the teacher, a weaker one, and as `start_of` where the student starts and the name of a LoRA's base). Raises
    CheckpointError where one does not fit, ValueError for a teacher that needs prompts and has none."""
    from ..backbones import load
    from ..backbones.base import weaker
    from ..checks import need
    from ..tutorial.bundled import find
    from ..tutorial.prompts import speaks
    from .console import open_teacher, pick_device
    from .start import start_of

    teacher = open_teacher(o.teacher, o.aside or o.device, o.frozen)
    times = [teacher.time(i) for i in (o.t_in, *o.form.student_then)]
    need(
        sorted(set(times), reverse=True) == times, "student_then", o.form.student_then, "timesteps that fall from t_in"
    )
    if not prompted and not speaks(teacher):
        raise ValueError(f"{teacher.name} is not of the tutorial world: give --prompts, a file with one prompt a line")
    if o.aside is not None:
        teacher.move_net(pick_device(o.device))
    weak = None
    if getattr(o.options, "autoguidance", 1.0) != 1:
        if o.weak is None and o.teacher != "teacher":
            raise ValueError("autoguidance needs --weak, a worse version of the teacher, such as an early checkpoint")
        weak = weaker(teacher, load(find(o.weak or "weak"), teacher.device))
    return teacher, weak, *start_of(o.init, teacher, o.form)


def source(o: Run, teacher: Backbone, prompts: list[str] | None, told: Callable[..., None]) -> tuple[Batches, Cond]:
    """(batches, the conditions of the prompts on sheets): of the tutorial world's prompts, or of those given, which are
    encoded once; then text encoders are forgotten, where saving a student copies them from the teacher's folder."""
    import torch

    from ..training.batches import prompt_batches, prompt_rows, text_encoders
    from ..tutorial.prompts import shape_batches
    from ..tutorial.shapes import sample_prompts

    if prompts is None:
        few = sample_prompts(SHOWN, torch.Generator().manual_seed(o.training.seed))
        return shape_batches(teacher, o.batch_size), teacher.encode(few)
    half = torch.bfloat16 if o.training.precision == "bf16" else None
    rows = prompt_rows(teacher, prompts, o.cache or o.out / "cache", half, told)
    if not teacher.in_comfyui:
        teacher.free(*text_encoders(teacher))
    return prompt_batches(teacher, rows, o.batch_size), rows[range(min(SHOWN, len(rows)))]


def try_dry(o: Run, teacher: Backbone, weak: Denoiser | None, start: dict[str, Any], prompts: list[str] | None) -> Path:
    """Print what the run would take. Raises SystemExit where it does not fit."""
    from ..training.batches import prompt_batches, prompt_rows, text_encoders
    from ..training.dry_run import DryRun
    from ..training.students import assemble
    from ..tutorial.prompts import shape_batches

    def batches(count: int) -> Batches:
        return shape_batches(teacher, count) if rows is None else prompt_batches(teacher, rows, count)

    rows = None if prompts is None else prompt_rows(teacher, prompts[: o.batch_size])
    if rows is not None and not teacher.in_comfyui:
        teacher.free(*text_encoders(teacher))
    few = {"pairs": 1, "pairs_minutes": None} if hasattr(o.options, "pairs") else {}
    method = assemble(teacher, replace(o.options, **few), o.training, o.form, t_in=o.t_in, weak=weak, **start)
    found = DryRun(teacher, method, batches, o.batch_size, o.training)
    print("\n".join(found.lines()))
    if not found.fits:
        raise SystemExit(1)
    return o.out


def identity(o: Run, t_in: float) -> dict[str, Any]:
    """What makes a run the run it is: a resume with another one is refused."""
    coach = ("coach", "rank", "alpha", "targets")
    fixed = {name: getattr(o.options, name) for name in coach if hasattr(o.options, name)} | asdict(o.form)
    fixed = {name: list(v) if isinstance(v, tuple) else v for name, v in fixed.items()}
    files = ("teacher", "init", "weak", "prompts")
    names = {name: Path(p).name if (p := getattr(o, name)) else None for name in files}
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
        elif f.name not in ("out", "cache", "device", "aside", "resume", "force", "dry_run"):
            found[f.name] = value
    return found
