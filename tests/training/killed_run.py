"""Runs that are meant to be killed (test_resume.py): forks a training process for each line on stdin, prints its steps.

One process imports torch, the forks start at once. No torch operation runs before a fork, so no threads are lost.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import accelerate  # noqa: F401  (here, so that the forks need not)
import torch
import torch.utils.tensorboard  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_runs import TINY, batches, build  # noqa: E402

from distill.training.loop import train  # noqa: E402


def main():
    for line in sys.stdin:
        out = line.strip()
        if (pid := os.fork()) == 0:
            torch.set_num_threads(1)
            method = build("copy")
            options = replace(TINY, steps=10**6, save_every=5)
            print(f"pid {os.getpid()}", flush=True)
            for step in train(method, batches, options, out, resume=True):
                print(f"step {step.step}", flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
