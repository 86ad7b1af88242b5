"""Makes the bundled models: `python -m distill.tutorial.build [judge features autoencoder ...]`, default all.

Every training keeps its state in `--work`, so that a stopped build goes on where it was, and one of more minutes goes
on from before its learning rate fell. Minutes are those of one core that the bundled files were given.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..backbones import load
from ..backbones.base import weaker
from ..backbones.patch import PatchAutoencoder
from ..file import checkpoint
from ..file.workflow import student_graph
from ..methods.vsd import VSDOptions
from ..training.options import TrainOptions
from ..training.students import train_student
from . import autoencoder, demo, features, text
from . import judge as judges
from . import teacher as teachers
from .bundled import ASSETS
from .fit import half_convolutions
from .metrics import Judge, evaluate, evaluate_seeds, known
from .prompts import shape_batches
from .rows import floors, under_law

PARTS = ("judge", "features", "autoencoder", "decoder", "text", "teacher", "student", "measure")
Part = Literal["judge", "features", "autoencoder", "decoder", "text", "teacher", "student", "measure"]


@dataclass(frozen=True)
class Build:
    parts: tyro.conf.Positional[tuple[Part, ...]] = PARTS
    """What to make, in this order. decoder: train the autoencoder's decoder on, for the same latents."""
    work: Path = Path.home() / ".cache/onestep/build"
    """Where states and parts are kept."""
    assets: Path = ASSETS
    """Where finished files go."""
    minutes: dict[str, float] | None = None
    """Minutes per part, e.g. --minutes teacher 5; default: what the bundled ones took."""
    start: Path | None = None
    """A teacher file of an earlier build to grow the teacher from: the bundled one was grown from its predecessor."""
    pool: int = 40192
    """Latents the teacher trains on."""
    n: int = 1024
    """Pictures behind the figures of `measure`."""
    seed: int = 0


TRIAL = 256  # pictures behind the choice among the teacher's averages
WEAK = 0.45  # of the teacher's time: when the checkpoint for autoguidance is kept
MINUTES = {"judge": 6.0, "features": 6.0, "autoencoder": 28.0, "decoder": 10.0, "text": 1.5, "teacher": 100.0}
MINUTES |= {"student": 96.0, "measure": 0.0}
STAGED = 0.35  # of the student's time: the demo's stages
SETTLING = {"lr": 5e-5, "coach_steps": 2}


def run(o: Build) -> None:
    o.work.mkdir(parents=True, exist_ok=True)
    makers = {
        "judge": make_judge,
        "features": make_features,
        "autoencoder": make_autoencoder,
        "decoder": make_decoder,
        "text": make_text,
        "teacher": make_teacher,
        "student": make_student,
        "measure": measure,
    }
    for part in PARTS:
        if part in o.parts:
            makers[part](o, (MINUTES | (o.minutes or {}))[part])


def make_judge(o: Build, minutes: float) -> None:
    judge = judges.train(minutes, o.seed, o.work)
    accuracy = {k: f"{v:.4f}" for k, v in judges.accuracy(judge).items()}
    print("judge on 4096 fresh renders:", accuracy)
    weights = {k: v.half() for k, v in judge.state_dict().items()}
    card = {"onestep.judge": "1", "accuracy": json.dumps(accuracy), "accuracy_n": "4096", "license": "Apache-2.0"}
    save_file(weights, o.assets / "judge.safetensors", card)


def make_features(o: Build, minutes: float) -> None:
    keep(o, "features", features.train(minutes, work=o.work))


def make_autoencoder(o: Build, minutes: float) -> None:
    for made_of_it in ("decoder.safetensors", "pool.safetensors"):
        (o.work / made_of_it).unlink(missing_ok=True)
    keep(o, "autoencoder", autoencoder.train(minutes, part(o, "features"), o.seed, o.work))


def make_decoder(o: Build, minutes: float) -> None:
    keep(o, "decoder", autoencoder.polish(part(o, "autoencoder"), minutes, part(o, "features"), o.seed, o.work))


def make_text(o: Build, minutes: float) -> None:
    keep(o, "text", text.train(minutes, o.seed, o.work)[0])


def make_teacher(o: Build, minutes: float) -> None:
    pool = latent_pool(o)
    conditions = teachers.Conditions(partial(text.encode, part(o, "text"), text.make_tokenizer()))
    unet = UNet2DConditionModel(**teachers.CONFIG)
    if o.start is not None:
        unet = teachers.grow(unet, load(o.start).net)

    def every(averages: dict[float, nn.Module], passed: float) -> None:
        if passed < WEAK * minutes or not (o.work / "weak.safetensors").exists():
            keep(o, "weak", averages[min(averages)])

    averages = teachers.train(pool, conditions, minutes, unet, o.seed, o.work, every=every)
    found, judge = {}, Judge.load(o.assets / "judge.safetensors")
    for decay, net in averages.items():
        keep(o, "teacher", net)
        model = load(pack_teacher(o, minutes))
        found[decay] = evaluate(lambda p, g, m=model: m.sample(p, g, steps=12), judge, n=TRIAL).frechet
        print(f"teacher, average {decay}: Frechet distance {found[decay]:.1f}, n = {TRIAL}, 12 steps", flush=True)
    keep(o, "teacher", averages[min(found, key=found.__getitem__)])
    pack_teacher(o, minutes)
    pack_weak(o, minutes)


def latent_pool(o: Build) -> tuple[Tensor, Tensor]:
    """What the teacher trains on, from the folder if it is there: a minute or two for each 40000."""
    path = o.work / "pool.safetensors"
    if not path.exists():
        attributes, latents = teachers.latent_pool(part(o, "autoencoder"), o.pool, o.seed)
        save_file({"attributes": attributes, "latents": latents}, path)
    found = load_file(path)
    return found["attributes"], found["latents"]


def keep(o: Build, name: str, module: nn.Module) -> None:
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, o.work / f"{name}.safetensors")


def part(o: Build, name: str) -> nn.Module:
    """A part that was made before, frozen. Raises FileNotFoundError where it was not."""
    path = o.work / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: make it first, with `python -m distill.tutorial.build {name}`")
    makers = {
        "features": features.Features,
        "autoencoder": lambda: PatchAutoencoder(**autoencoder.CONFIG),
        "decoder": lambda: PatchAutoencoder(**autoencoder.CONFIG),
        "text": text.make_encoder,
        "teacher": lambda: UNet2DConditionModel(**teachers.CONFIG),
        "weak": lambda: UNet2DConditionModel(**teachers.CONFIG),
    }
    module = makers[name]()
    module.load_state_dict(load_file(path))
    return module.eval().requires_grad_(False)


def latest_autoencoder(o: Build) -> PatchAutoencoder:
    return part(o, "decoder" if (o.work / "decoder.safetensors").exists() else "autoencoder")


LATENT = {"channels": autoencoder.CONFIG["channels"], "scale": 1.0, "shift": 0.0, "factor": 8}
CARD = {
    "prediction": teachers.PREDICTION,
    "schedule": teachers.SCHEDULE.spec,
    "t_in": 999,
    "steps": 20,
    "guidance": {"scale": teachers.GUIDANCE, "baked": False},
}
"""What the metadata says about calling the teacher and its early checkpoint."""


def pack_teacher(o: Build, minutes: float) -> Path:
    """Write the teacher as one OneStep file, from its parts."""
    vae = latest_autoencoder(o)
    factors, bias = preview(vae)
    config = {"minutes": minutes, "seed": o.seed, "start": o.start.name if o.start else None}
    pipeline = checkpoint.from_modules(
        part(o, "teacher"), vae, part(o, "text"), text.make_tokenizer(),
        latent=LATENT | {"rgb_factors": factors, "rgb_bias": bias}, **CARD, config=config,
    )  # fmt: skip
    return checkpoint.write(o.assets / "teacher.safetensors", checkpoint.pack(pipeline), torch.float16)


def pack_weak(o: Build, minutes: float) -> Path:
    """Write the teacher's early checkpoint, U-Net alone. A weak net may be coarse: 8-bit floats, 0.026 off."""
    config = {"minutes": WEAK * minutes, "seed": o.seed}
    pipeline = checkpoint.from_modules(part(o, "weak"), latent=LATENT, **CARD, config=config)
    return checkpoint.write(o.assets / "weak.safetensors", checkpoint.pack(pipeline), torch.float8_e4m3fn)


def make_student(o: Build, minutes: float) -> None:
    """The bundled student is the demo's, given more time, then settled: at half the rate, with a coach twice as fast,
    which follows the student's spread where a slower one lets it shrink."""
    teacher, weak = load(o.assets / "teacher.safetensors"), load(o.assets / "weak.safetensors")
    how = {"weak": weaker(teacher, weak), "resume": True}
    vsd = VSDOptions(**demo.LAW, **SETTLING, coach="copy", coach_warmup=200)
    time_left = (1 - STAGED) * minutes
    training = TrainOptions(steps=None, minutes=time_left, seed=o.seed + 11, ema=0.998, decay_from=0.4)
    with half_convolutions():
        *_, last = demo.stages(teacher, o.work / "student", minutes=STAGED * minutes, seed=o.seed, **how)
        batches, net = shape_batches(teacher, demo.BATCH), copy.deepcopy(last.ema)
        *_, last = train_student(teacher, vsd, batches, training, o.work / "student" / "settled", net=net, **how)
    about = {"method": "vsd", "config": demo.LAW | SETTLING | {"minutes": minutes, "seed": o.seed}}
    about["workflow"] = student_graph("bundled: student")  # the name it has in ComfyUI's list
    teacher.save_student(o.assets / "student.safetensors", last.ema, **about)


@torch.no_grad()
def preview(patch: PatchAutoencoder) -> tuple[list, list]:
    """The linear map from a latent to the mean colour of its patch, by least squares: factors (C, 3) and bias (3,)."""
    images = autoencoder.pictures(256, torch.Generator().manual_seed(5))
    z = patch.encode(images).permute(0, 2, 3, 1).reshape(-1, patch.config["channels"])
    colour = nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], 1), colour).solution
    return [[round(v, 5) for v in row] for row in solution[:-1].tolist()], [round(v, 5) for v in solution[-1].tolist()]


def measure(o: Build, minutes: float) -> None:
    """Write the figures into the files: the student's own, and the rows that the teacher's stand among."""
    judge = Judge.load(o.assets / "judge.safetensors")
    teacher, student = load(o.assets / "teacher.safetensors"), load(o.assets / "student.safetensors")
    weak = weaker(teacher, load(o.assets / "weak.safetensors"))
    own = teacher.meta.steps
    rows = {
        student: {"1 step": student.sample},
        teacher: {
            f"{own} steps": teacher.sample,
            "the student's law": under_law(teacher, weak, demo.LAW),
            "1 step": lambda p, g: teacher.sample(p, g, steps=1),
        },
    }
    for model, ways in rows.items():
        metrics = {}
        for name, way in ways.items():
            with half_convolutions():  # half the time of full precision's
                metrics[name] = known(evaluate_seeds(way, judge, o.n))
            print(model.name, name, metrics[name], flush=True)
            store(o.assets / model.name, metrics)
    print(floors(teacher, judge, n=o.n))


def store(path: Path, metrics: dict) -> None:
    """Write a file again with these figures in its metadata, its weights as they are."""
    held = checkpoint.read(path)
    checkpoint.write(path, replace(held, meta=replace(held.meta, metrics=metrics)))


if __name__ == "__main__":
    run(tyro.cli(Build, description=__doc__))
