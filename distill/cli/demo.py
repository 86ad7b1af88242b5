"""`distill demo`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Literal

ONE = "the demo runs in one process; several train by `torchrun -m distill train`"


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
    teacher: str = "teacher"
    """The bundled teacher, or a teacher file of the tutorial world."""
    weak: str | None = None
    """A worse version of the teacher, for autoguidance. Default: the bundled one's; none for a teacher of your own."""
    coach: Literal["lora", "copy"] = "copy"
    """lora: adapters on the frozen teacher (least memory); copy: a second net (at this size faster and as good)."""


def run(o: Demo) -> dict:
    """Run the demo and return what report.json holds. Raises FileExistsError for a folder that holds a run."""
    from ..backbones import load
    from ..backbones.base import weaker
    from ..checks import SEEDS, need, within
    from ..tutorial.bundled import find
    from ..tutorial.demo import LAW, stages
    from ..tutorial.fit import half_convolutions
    from ..tutorial.prompts import speaks
    from .console import bars, open_teacher, refuse_run, writable

    within(o, seed=SEEDS)
    need(0 < o.minutes < inf, "minutes", o.minutes, "a time, above 0")
    need(os.environ.get("WORLD_SIZE", "1") == "1", "WORLD_SIZE", os.environ.get("WORLD_SIZE"), ONE)
    writable(o.out, folder=True)
    file = o.out / "student.safetensors"
    refuse_run(o.out, [o.out / "regression", o.out / "vsd"], o.resume)
    teacher = open_teacher(o.teacher, o.device)
    need(speaks(teacher), "teacher", teacher.name, "not of the tutorial world; use `distill train` for it")
    weak = None
    if o.teacher == "teacher" or o.weak is not None:
        weak = weaker(teacher, load(find(o.weak or "weak"), teacher.device))
    else:
        print("no autoguidance: it needs a worse version of this teacher (--weak)")
    print(f"teacher: {teacher.name} on {teacher.device}, seed {o.seed}, {o.minutes:g} minutes -> {o.out}/")
    config = {k: v for k, v in asdict(o).items() if k not in ("out", "device", "resume", "teacher", "weak")}
    config |= LAW if weak is not None else LAW | {"autoguidance": 1.0}
    about = {"method": "vsd", "config": config, "guidance": {"scale": LAW["guidance"], "baked": True}}
    about["workflow"] = teacher.graph(file)
    step = None
    how = {"minutes": o.minutes, "seed": o.seed, "coach": o.coach, "weak": weak, "resume": o.resume}
    try:
        with (
            bars() as told,
            half_convolutions(None if teacher.device.type == "cpu" else False),
        ):  # half again as many steps
            for latest in stages(teacher, o.out, **how, told=told):
                step = latest
    except KeyboardInterrupt:
        if step is None:
            print(f"\nStopped before the student's first step; go on with: distill demo --out {o.out} --resume")
        else:
            teacher.save_student(file, step.ema, **about)
            print(f"\nStopped. {file} is the student so far; go on with: distill demo --out {o.out} --resume")
        raise
    teacher.save_student(file, step.ema, **about)
    return finish(o, teacher, about)


def finish(o: Demo, teacher, about: dict) -> dict:
    """Measure the student, draw the comparison, write report.json and workflow.json, print the table."""
    from ..backbones import load
    from ..tutorial.demo import compare
    from ..tutorial.metrics import Judge, evaluate
    from ..tutorial.rows import print_table
    from .console import write_json

    file = o.out / "student.safetensors"
    student = load(file, teacher.device)
    # The teacher's figures were made by `python -m distill.tutorial.build measure`: its many steps take minutes.
    rows = {f"teacher, {name}": report for name, report in teacher.meta.metrics.items()}
    rows["student, 1 step"] = evaluate(lambda p, g: student.sample(p, g).cpu(), Judge.load()).to_dict()
    times = compare(teacher, student, o.out / "comparison.png", o.seed)
    report = {"seed": o.seed, "minutes": o.minutes, "seconds_per_image": times, "rows": rows}
    write_json(o.out / "report.json", report)
    teacher.save_student(file, student.net, metrics={"1 step": rows["student, 1 step"]}, **about)
    print_table(rows)
    print(f"\n{o.out}/comparison.png shows the three side by side; {o.out}/report.json holds the figures.")
    write_json(o.out / "workflow.json", about["workflow"])
    print(f"In ComfyUI: put {file} into models/diffusion_models, and drop it, or {o.out}/workflow.json, on the page.")
    return report
