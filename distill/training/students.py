"""A whole run: a teacher and a method's options in, a student out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters import Adapters
from ..backbones.base import Backbone
from ..denoiser import Denoiser
from ..methods.base import Batches, Method, Options, Parts, Told
from ..student import Student, StudentOptions
from .loop import placed, seeded, train
from .options import TrainOptions
from .state import Step

if TYPE_CHECKING:
    from PIL.Image import Image


def train_student(
    teacher: Backbone,
    options: Options,
    batches: Batches,
    training: TrainOptions | None = None,
    out: str | Path | None = None,
    *,
    student: StudentOptions | None = None,
    net: nn.Module | None = None,
    adapters: Adapters | None = None,
    t_in: float | None = None,
    weak: Denoiser | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    identity: Mapping[str, Any] | None = None,
    told: Told = lambda what, share: None,
    sheet: Callable[[nn.Module], Image] | None = None,
) -> Iterator[Step]:
    """Train a student of one step, or a few, of a teacher by the method that `options` (such as VSDOptions()) describe.

        for step in train_student(teacher, VSDOptions(), prompt_batches(teacher, prompts, 32), out="runs/mine"):
            print(step.step, step.logs)
        teacher.save_student("student.safetensors", step.ema, method="vsd")

    batches: of prompts, as training.batches makes them. student: full weights or a LoRA. net: where it starts, trained
    in place unless by a LoRA; default a copy of the teacher's, or for a LoRA that one itself. adapters: where a LoRA
    starts on that net, such as another's. t_in: the timestep the student is called at, as the net counts them; default
    the teacher's noisiest. weak: a worse teacher, for autoguidance. told(what, share) hears of data that is made first.
    The rest is as for `train`, ValueError and Diverged included. The teacher's weights stay as they are.
    """
    training = training or TrainOptions()
    method = assemble(teacher, options, training, student, net, adapters, t_in, weak)
    folder = Path(out) if out is not None else None
    drawn = method.data(placed(batches, teacher.device), seeded("cpu", training.seed, 1), folder, told)
    how = {"device": device or teacher.device, "identity": identity, "sheet": sheet}
    yield from train(method, drawn, training, out, resume, **how)


def assemble(
    teacher: Backbone,
    options: Options,
    training: TrainOptions,
    student: StudentOptions | None = None,
    net: nn.Module | None = None,
    adapters: Adapters | None = None,
    t_in: float | None = None,
    weak: Denoiser | None = None,
) -> Method:
    """The method with its nets, as `train_student` trains it; see there."""
    form, targets = student or StudentOptions(), teacher.lora_targets()
    grown = form.grow(teacher.net, net, targets, seeded("cpu", training.seed, 3))
    one = Student(grown, teacher.wrap, teacher.time(t_in), [teacher.time(i) for i in form.student_then])
    if adapters is not None:
        one.load_state_dict(adapters)
    drawn_from = seeded("cpu", training.seed, 2)
    return options.build(Parts(teacher.net, teacher.wrap, one, teacher.null, weak, drawn_from, targets))
