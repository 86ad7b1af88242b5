"""Training a one-step student inside a graph."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..distill.file.metadata import read_metadata
from ..distill.header import CheckpointError
from .files import BUNDLED, DIFFUSION, check_target, choices, fingerprint, locate, place

if TYPE_CHECKING:
    from ..distill.backbones.base import Backbone
    from ..distill.training.state import Step

TEACHERS = [name for name, model in BUNDLED.items() if model == "teacher"]
SECONDS = 4.0  # between previews
WORLD = ["a small red ring", "a large yellow star on a blue background", "a green heart", "a blue square"]
"""prompts of the preview for teachers of the tutorial"""


class OneStepTrainStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepTrainStudent",
            display_name="OneStep Train Student",
            category="OneStep",
            description="Trains a one-step student of a teacher with a coach, here in the graph, and shows its "
            "pictures while it learns. Cancel keeps the student so far. Needs the packages of the distill extra.",
            search_aliases=["train", "distill", "distillation", "make student", "DMD", "VSD", "fine-tune", "finetune"],
            inputs=[
                io.Combo.Input(
                    "teacher",
                    options=[*TEACHERS, *(n for n in choices(DIFFUSION) if n not in BUNDLED)],
                    default=TEACHERS[0],
                    tooltip="The bundled teacher, of which five minutes make a student, or a teacher in OneStep's "
                    "format.",
                ),
                io.Float.Input(
                    "minutes",
                    default=5.0,
                    min=0.05,
                    max=100_000.0,
                    step=0.5,
                    tooltip="Time for the training. Five on two CPU cores do for the bundled teacher; others need "
                    "hours on a GPU.",
                ),
                io.String.Input(
                    "name",
                    default="my-student",
                    tooltip="Name of the new file in models/diffusion_models; a number follows where it is taken.",
                ),
                io.Int.Input(
                    "training_seed",
                    default=0,
                    min=0,
                    max=2**31,
                    tooltip="Of every random number. Another one trains another student.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder of a diffusers model to be the teacher instead. Empty: the file above.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What a teacher of your own trains on, one prompt a line: the more the better. The bundled "
                    "teacher knows its own.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=1024,
                    tooltip="Pictures in a step, for a teacher of your own. The bundled teacher's demo takes 32.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The student, for OneStep Sample."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder: the teacher's."),
                io.Vae.Output(display_name="vae", tooltip="Its VAE: the teacher's."),
                io.String.Output(display_name="report", tooltip="Where the student is, and how long it trained."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, teacher, folder="", **kwargs):
        return None if folder else fingerprint(teacher)

    @classmethod
    def execute(cls, teacher, minutes, name, training_seed, folder, prompts, batch_size) -> io.NodeOutput:
        source, file, start = origin(teacher, folder), target(name), time.monotonic()
        with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs nodes without gradients
            stopped, steps = train(source, file, minutes, training_seed, prompts, batch_size)
        said = f"{file.name}: {steps} steps in {(time.monotonic() - start) / 60:.1f} minutes"
        if stopped:
            print(f"OneStep: cancelled; the student so far is {file}")
            raise mm.InterruptProcessingException()
        from . import native

        parts = native.load(file, folder_paths.get_folder_paths("embeddings"))
        return io.NodeOutput(*parts, said, ui=ui.PreviewText(said))


def origin(teacher: str, folder: str) -> Path:
    """Where the teacher is. Raises CheckpointError for a folder that is not there, and for a student."""
    if folder:
        if not Path(folder).exists():
            raise CheckpointError(f"{folder}: no such folder. Give the path of a diffusers model, or leave it empty.")
        return Path(folder)
    file = locate(teacher)
    made = read_metadata(file).method
    if made != "teacher":
        raise CheckpointError(f"{teacher}: a student already, made by {made}. Choose what it was made of.")
    return file


def target(name: str) -> Path:
    """Where the student goes. Raises CheckpointError for a name that leads out of the folder."""
    root = Path(place("diffusion_models"))
    stem = name.strip().removesuffix(".safetensors") or "my-student"
    file, number = root / f"{stem}.safetensors", 1
    check_target(file)
    if not file.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"name {name!r} leads out of {root}. Give a name without '..'.")
    while file.exists():
        number += 1
        file = root / f"{stem}-{number}.safetensors"
    return file


def need_packages(*packages: str) -> None:
    """Raise ValueError where one of the packages that training needs beyond ComfyUI's own is missing."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as e:
            raise ValueError(
                f"OneStep Train Student needs {e.name}, which ComfyUI does not bring: pip install accelerate diffusers "
                "peft with ComfyUI's Python, and start ComfyUI again."
            ) from None


def train(source: Path, file: Path, minutes: float, seed: int, prompts: str, batch_size: int) -> tuple[bool, int]:
    """Train and write the file -> (whether Cancel was pressed, steps). Before the first step Cancel leaves nothing.

    Raises ValueError where packages are missing, for a family that ComfyUI has no loader for, and for a teacher of
    another world than the tutorial's without prompts; CheckpointError for one whose student would be no MODEL.
    """
    need_packages("accelerate", "diffusers")
    from ..distill.backbones import load
    from .native.model import Config

    mm.unload_all_models()
    teacher, given = load(source, mm.get_torch_device()), [p.strip() for p in prompts.splitlines() if p.strip()]
    if not teacher.in_comfyui:
        raise ValueError(f"{source.name}: students of this family open outside of ComfyUI only. Use `distill train`.")
    Config(source, teacher.meta)  # now, not after hours: what no MODEL can be
    work = Path(tempfile.mkdtemp(prefix="onestep-train-", dir=folder_paths.get_temp_directory()))
    page, stopped, step = Page(teacher, given), False, None
    steps, about = run(teacher, source, work, minutes, seed, given, batch_size, page.told)
    about["workflow"] = teacher.graph(file, None if page.staged else given[0])
    try:
        for step in steps:
            page.show(step)
    except mm.InterruptProcessingException:
        stopped = True
        if step is None:
            raise
    finally:
        steps.close()
        shutil.rmtree(work, ignore_errors=True)
        if step is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            teacher.save_student(file, step.ema, **about)
    return stopped, step.step


def run(
    teacher: Backbone, source: Path, work: Path, minutes: float, seed: int, prompts: list[str], batch_size: int,
    told: Callable[..., None],
) -> tuple[Generator[Step], dict[str, Any]]:  # fmt: skip
    """(the steps of the training that suits the teacher, what the student's file says of it)"""
    from ..distill.backbones import load
    from ..distill.backbones.base import weaker
    from ..distill.methods.vsd import VSDOptions
    from ..distill.training.batches import prompt_batches
    from ..distill.training.options import TrainOptions
    from ..distill.training.students import train_student
    from ..distill.tutorial.bundled import bundled
    from ..distill.tutorial.demo import LAW, stages
    from ..distill.tutorial.prompts import speaks

    about = {"method": "vsd", "config": {"minutes": minutes, "seed": seed}}
    if speaks(teacher):
        weak = weaker(teacher, load(bundled("weak"), teacher.device)) if source == bundled("teacher") else None
        about["guidance"] = {"scale": LAW["guidance"], "baked": True}
        return stages(teacher, work, minutes=minutes, seed=seed, weak=weak, told=told), about
    if not prompts:
        raise ValueError(f"{source.name} is not of the tutorial's world: write prompts to train on, one a line.")
    need_packages("peft")  # the coach's adapters
    options = VSDOptions()
    about["guidance"] = {"scale": options.guidance, "baked": True}
    training = TrainOptions(steps=None, minutes=minutes, seed=seed)
    batches = prompt_batches(teacher, prompts, batch_size)
    return train_student(teacher, options, batches, training, told=told), about


class Page:
    """What the page sees while the student learns: how far it is, and four pictures from the same noise."""

    def __init__(self, teacher: Backbone, prompts: list[str]):
        from ..distill.training.sheets import sheets
        from ..distill.tutorial.demo import SHARES
        from ..distill.tutorial.prompts import speaks

        pairs, regression, vsd = (share / sum(SHARES.values()) for share in SHARES.values())
        self.spans = {"teacher pairs": (0.0, pairs), "regression": (pairs, regression), "coach": (1 - vsd, vsd)}
        shown = WORLD if speaks(teacher) else prompts or [""]
        self.last, self.bar = -SECONDS, comfy.utils.ProgressBar(1000)
        self.staged, self.done = speaks(teacher), 0.0
        self.sheet = sheets(teacher, teacher.encode([shown[i % len(shown)] for i in range(4)]))

    def told(self, what: str, share: float, **readouts: float) -> None:
        """Training's `told`. Raises InterruptProcessingException where Cancel was pressed."""
        mm.throw_exception_if_processing_interrupted()
        if self.staged and what in self.spans:
            start, length = self.spans[what]
            self.done = start + length * share
            self.bar.update_absolute(int(1000 * self.done), 1000)

    def show(self, step: Step) -> None:
        """Every SECONDS draw the averaged student's pictures."""
        self.done = self.done if self.staged else step.progress
        self.told("", 0.0)
        if time.monotonic() - self.last < SECONDS:
            return self.bar.update_absolute(int(1000 * self.done), 1000)
        from PIL import Image

        page = self.sheet(step.ema)
        scale = max(1, 512 // page.width)
        page = page.resize((scale * page.width, scale * page.height), Image.Resampling.NEAREST)
        self.bar.update_absolute(int(1000 * self.done), 1000, ("JPEG", page, None))
        self.last = time.monotonic()
