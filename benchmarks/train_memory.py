"""What training takes of the CPU's memory beside what the dry run says it would, in GB.

    python benchmarks/train_memory.py [MODEL ...] [--student full] [--batch-size 4] [--no-gradient-checkpointing]

MODEL is a file, a folder, a bundled model, or random-sd15: Stable Diffusion 1.5's U-Net (859 M) of random weights, at
512 pixels. By VSD, in fp32. One fork estimates, another trains; "beyond" is what the system says it held at most, less
what it held when the model was open. Python's own dozen of MB is beside the tensors.
What glibc keeps of freed memory too, unless MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536 are set.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import accelerate  # noqa: F401  (here, so that the forks need not)
import diffusers  # noqa: F401
import peft  # noqa: F401
import torch
import tyro

from distill.backbones import load
from distill.backbones.base import Backbone
from distill.backbones.own import Own
from distill.methods.vsd import VSDOptions
from distill.schedule import ddpm
from distill.student import StudentOptions
from distill.training.batches import prompt_batches
from distill.training.dry_run import DryRun
from distill.training.options import TrainOptions
from distill.training.students import assemble, train_student
from distill.tutorial.bundled import find

PROMPTS = ["a red ring"] * 4


@dataclass(frozen=True)
class Options:
    models: tyro.conf.Positional[list[str]] = field(default_factory=lambda: ["random-sd15"])
    student: Literal["full", "lora"] = "lora"
    rank: int = 64
    """Of the coach, and of a LoRA student."""
    guidance: float = 1.5
    """Other than 1, the teacher sees every batch twice over."""
    batch_size: int = 1
    steps: int = 2
    gradient_checkpointing: bool = True
    warm_steps: int = 0
    """Steps at a batch of one before memory is watched: libraries keep some MB from their first calls."""

    def parts(self) -> tuple[VSDOptions, TrainOptions, StudentOptions]:
        """Of the method, of the loop, of the student."""
        loop = {"max_spread": 1e9, "gradient_checkpointing": self.gradient_checkpointing}
        method = VSDOptions(rank=self.rank, guidance=self.guidance, lr=1e-6, coach_lr=1e-6)
        return method, TrainOptions(steps=self.steps, **loop), StudentOptions(self.student, student_rank=self.rank)


class RandomSD15(torch.nn.Module):
    """Stable Diffusion 1.5's U-Net, called as one's own network is."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)

    def forward(self, x: torch.Tensor, index: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w), (B,), (B, 77, 768) -> a prediction of the noise."""
        return self.unet(x, index, words, return_dict=False)[0]


def opened(name: str) -> Backbone:
    """The model of the command line."""
    if name != "random-sd15":
        return load(find(name))
    null = torch.randn(1, 77, 768)
    how = {"null": null, "encode": lambda prompts: null.expand(len(prompts), -1, -1)}
    return Own(RandomSD15(), (4, 64, 64), "eps", ddpm(), **how)


def estimated(o: Options, name: str) -> dict[str, float]:
    """(bytes of the teacher with its other parts; of all, as the dry run has them)."""
    model, (method, training, form) = opened(name), o.parts()
    method = assemble(model, method, training, form)
    found = DryRun(model, method, lambda n: prompt_batches(model, PROMPTS, n), o.batch_size, training)
    held = sum(found.parts[part][1] for part in ("teacher", "text encoders, VAE") if part in found.parts)
    return {"teacher": held / 1e9, "estimate": found.total() / 1e9}


def measured(o: Options, name: str) -> dict[str, float]:
    """Bytes that the teacher takes, and that a run takes beyond it."""
    model, (method, training, form) = opened(name), o.parts()
    for _ in range(o.warm_steps):
        next(train_student(model, method, prompt_batches(model, PROMPTS, 1), training, student=form))
    batches = prompt_batches(model, PROMPTS, o.batch_size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = status("VmRSS"), time.perf_counter()
    for _ in train_student(model, method, batches, training, student=form):
        pass
    return {"beyond": (status("VmHWM") - before) / 1e9, "seconds": time.perf_counter() - start}


def status(name: str) -> int:
    """Bytes, of a line of the system's on this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def apart(work, *args) -> dict:
    """What work(*args) returns, from a process of its own."""
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(theirs, json.dumps(work(*args)).encode())
        os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with os.fdopen(ours) as told:
        return json.loads(told.read())


def main(o: Options) -> None:
    for name in o.models:
        found = apart(estimated, o, name) | apart(measured, o, name)
        peak = found["teacher"] + found["beyond"]
        numbers = found | {"peak": peak, "ratio": found["estimate"] / peak}
        print(json.dumps({"model": Path(name).name} | {k: round(v, 4) for k, v in numbers.items()}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    sys.exit(main(tyro.cli(Options, description=__doc__)))
