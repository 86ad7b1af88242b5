"""What a run takes, estimated and measured (test_dry_run.py): MODEL PROMPTS BATCH on stdin's lines -> two numbers each.

One process imports torch, a fork estimates, another trains; what the second took is what the system says it held.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path

import accelerate  # noqa: F401  (here, so that the forks need not)
import diffusers  # noqa: F401
import peft  # noqa: F401
import torch

from distill.backbones import load
from distill.methods.vsd import VSDOptions
from distill.training.batches import prompt_batches
from distill.training.dry_run import DryRun
from distill.training.options import TrainOptions
from distill.training.students import assemble, train_student

OPTIONS = VSDOptions(rank=8, guidance=2.0, lr=1e-6, coach_lr=1e-6)
TRAINING = TrainOptions(steps=3, max_spread=1e6)


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def estimated(model, prompts, batch):
    found = DryRun(
        model, assemble(model, OPTIONS, TRAINING), lambda n: prompt_batches(model, prompts, n), batch, TRAINING
    )
    loaded = found.parts["teacher"][1] + found.parts["text encoders, VAE"][1]
    return found.total() - loaded


def measured(model, prompts, batch):
    for _ in train_student(model, OPTIONS, prompt_batches(model, prompts, 1), TRAINING):
        pass  # what libraries load and keep at their first call is no part of a step
    batches = prompt_batches(model, prompts, batch)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    for _ in train_student(model, OPTIONS, batches, TRAINING):
        pass
    return status("VmHWM") - before


def main():
    for line in sys.stdin:
        path, batch, *words = line.split()
        for what in (estimated, measured):
            if (pid := os.fork()) == 0:
                torch.set_num_threads(1)
                print(what(load(path), [" ".join(words)] * 4, int(batch)), flush=True)
                os._exit(0)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
