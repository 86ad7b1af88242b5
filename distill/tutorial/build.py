"""Makes the bundled models: `python -m distill.tutorial.build [vae text judge teacher student]`, default all.

Parts are kept in `--work` as they are made, so that each can be made again alone. The minutes are those the bundled
files were given on two cores of a shared virtual machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from ..backbones import load
from ..backbones.base import Backbone, weaker
from ..backbones.patch import PatchAutoencoder
from ..file import checkpoint
from . import autoencoder, demo, text
from . import judge as judges
from . import teacher as teachers
from .bundled import ASSETS
from .metrics import Judge, evaluate

PARTS = ("vae", "text", "judge", "teacher", "student", "measure")


@dataclass(frozen=True)
class Build:
    parts: tyro.conf.Positional[tuple[Literal["vae", "text", "judge", "teacher", "student", "measure"], ...]] = PARTS
    """What to make, in this order."""
    work: Path = Path("runs/tutorial")
    """Where parts are kept."""
    assets: Path = ASSETS
    """Where finished files go."""
    minutes: dict[str, float] | None = None
    """Minutes per part, e.g. --minutes teacher 5; default: what the bundled ones took."""
    pool: int = 60000
    """Latents the teacher trains on."""
    seed: int = 0


WEAK = 20 / 47  # of the teacher's time: when the checkpoint for autoguidance is kept
MINUTES = {"vae": 8.0, "text": 1.5, "judge": 6.0, "teacher": 47.0, "polish": 44.0, "student": 20.0}


def run(o: Build) -> None:
    o.work.mkdir(parents=True, exist_ok=True)
    minutes = MINUTES | (o.minutes or {})
    makers = {
        "vae": make_vae,
        "text": make_text,
        "judge": make_judge,
        "teacher": make_teacher,
        "student": make_student,
        "measure": measure,
    }
    for part in PARTS:
        if part in o.parts:
            makers[part](o, minutes.get(part, 0.0))


def make_vae(o: Build, minutes: float) -> None:
    trained = autoencoder.train(minutes, o.seed)
    save_file(
        autoencoder.polish(trained, (MINUTES | (o.minutes or {}))["polish"]).state_dict(), o.work / "vae.safetensors"
    )


def make_text(o: Build, minutes: float) -> None:
    save_file(text.train(minutes, o.seed)[0].state_dict(), o.work / "text.safetensors")


def make_judge(o: Build, minutes: float) -> None:
    judge = judges.train(minutes, o.seed)
    accuracy = {k: f"{v:.4f}" for k, v in judges.accuracy(judge).items()}
    print("judge on 4096 fresh renders:", accuracy)
    weights = {k: v.half() for k, v in judge.state_dict().items()}
    card = {"onestep.judge": "1", "accuracy": json.dumps(accuracy), "accuracy_n": "4096", "license": "Apache-2.0"}
    save_file(weights, o.assets / "judge.safetensors", card)


def parts(o: Build) -> tuple[PatchAutoencoder, nn.Module]:
    autoencoder, encoder = PatchAutoencoder(), text.make_encoder()
    autoencoder.load_state_dict(load_file(o.work / "vae.safetensors"))
    encoder.load_state_dict(load_file(o.work / "text.safetensors"))
    return autoencoder.eval().requires_grad_(False), encoder.eval().requires_grad_(False)


def make_teacher(o: Build, minutes: float) -> None:
    autoencoder, encoder = parts(o)
    tokenizer = text.make_tokenizer()
    pool = teachers.latent_pool(autoencoder, o.pool, o.seed)

    def save(unet: nn.Module, passed: float) -> None:
        weights = {k: v.contiguous() for k, v in unet.state_dict().items()}
        save_file(weights, o.work / "teacher.safetensors")
        if passed < 1.01 * WEAK * minutes:
            save_file(weights, o.work / "weak.safetensors")

    encode = partial(text.encode, encoder, tokenizer)
    save(teachers.train(pool, encode, minutes, seed=o.seed, every=save, every_minutes=WEAK * minutes / 2), minutes)
    pack_teacher(o)
    pack_weak(o)


def pack_teacher(o: Build) -> Path:
    """Write the teacher as one OneStep file, from its parts."""
    autoencoder, encoder = parts(o)
    factors, bias = preview(autoencoder)
    latent = {"channels": 8, "scale": 1.0, "shift": 0.0, "factor": 8, "rgb_factors": factors, "rgb_bias": bias}
    pipeline = checkpoint.from_modules(
        saved_unet(o, "teacher"), autoencoder, encoder, text.make_tokenizer(), latent=latent, **CARD,
        config={"minutes": MINUTES["teacher"], "seed": o.seed},
    )  # fmt: skip
    return checkpoint.write(o.assets / "teacher.safetensors", checkpoint.pack(pipeline), torch.float16)


def pack_weak(o: Build) -> Path:
    """Write the teacher's early checkpoint, U-Net alone. A weak net may be coarse: 8-bit floats, 0.026 off."""
    latent = {"channels": 8, "scale": 1.0, "shift": 0.0, "factor": 8}
    config = {"minutes": WEAK * MINUTES["teacher"], "seed": o.seed}
    pipeline = checkpoint.from_modules(saved_unet(o, "weak"), latent=latent, **CARD, config=config)
    return checkpoint.write(o.assets / "weak.safetensors", checkpoint.pack(pipeline), torch.float8_e4m3fn)


CARD = {
    "prediction": teachers.PREDICTION,
    "schedule": teachers.SCHEDULE.spec,
    "t_in": 999,
    "steps": 50,
    "guidance": {"scale": teachers.GUIDANCE, "baked": False},
}
"""What the metadata says about calling the teacher and its early checkpoint."""


def saved_unet(o: Build, name: str) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**teachers.CONFIG)
    unet.load_state_dict(load_file(o.work / f"{name}.safetensors"))
    return unet


def make_student(o: Build, minutes: float) -> None:
    """The bundled student is the demo's, given more time."""
    teacher, weak = o.assets / "teacher.safetensors", o.assets / "weak.safetensors"
    made = load(teacher)
    *_, last = demo.stages(made, o.work / "student", minutes=minutes, seed=o.seed, weak=weaker(made, load(weak)))
    about = {"method": "vsd", "config": demo.LAW | {"minutes": minutes, "seed": o.seed}}
    made.save_student(o.assets / "student.safetensors", last.ema, **about)


@torch.no_grad()
def preview(patch: PatchAutoencoder) -> tuple[list, list]:
    """The linear map from a latent to the mean colour of its patch, by least squares: factors (C, 3) and bias (3,)."""
    images = autoencoder.pictures(256, torch.Generator().manual_seed(5))
    z = patch.encode(images).permute(0, 2, 3, 1).reshape(-1, 8)
    colour = nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], 1), colour).solution
    return [[round(v, 5) for v in row] for row in solution[:-1].tolist()], [round(v, 5) for v in solution[-1].tolist()]


def measure(o: Build, minutes: float) -> None:
    """Write each bundled model's own figures into its metadata, by the number of steps."""
    judge = Judge.load(o.assets / "judge.safetensors")
    for name in ("teacher", "student"):
        path = o.assets / f"{name}.safetensors"
        model = load(path)
        metrics = {}
        for steps in sorted({model.meta.steps, 1}, reverse=True):
            key = "1 step" if steps == 1 else f"{steps} steps"
            metrics[key] = evaluate(lambda p, g, m=model, k=steps: m.sample(p, g, steps=k), judge).to_dict()
            print(name, key, metrics[key], flush=True)
        store(path, model, metrics)


def store(path: Path, model: Backbone, metrics: dict) -> None:
    model.save_student(
        path, model.net, metrics=metrics, method=model.meta.method, steps=model.meta.steps,
        guidance=model.meta.guidance, teacher=model.meta.teacher,
    )  # fmt: skip


if __name__ == "__main__":
    run(tyro.cli(Build, description=__doc__))
