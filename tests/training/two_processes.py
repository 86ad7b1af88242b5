"""One of the processes that test_processes.py starts: trains in OUT, as CASE says, and prints its weights; last of all,
where the system tells, how many of gloo's threads are left.

OUT CASE [KIND]: "whole", to the end; "stop", to step 6; "killed", the second process dies in step 7; "endless", until
SIGTERM. KIND is a method of small_runs.py, by default with a copy of the teacher as coach.
"""

import atexit
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(p) for p in Path(__file__).parents[1:3]]
from small_runs import TINY, batches, build  # noqa: E402

from distill.training.loop import train  # noqa: E402
from distill.training.sharding import full, whole  # noqa: E402


def terminated(signum, frame):
    raise KeyboardInterrupt


def leave():
    """A thread of gloo's that is alive when Python ends can abort the process, once in a hundred times."""
    print("gloo", sum(p.read_text().startswith("pt_gloo") for p in Path("/proc/self/task").glob("*/comm")), flush=True)


def main(out, case, kind="copy"):
    torch.set_num_threads(1)
    atexit.register(leave)  # the last one called
    signal.signal(signal.SIGTERM, terminated)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    steps = 10**6 if case == "endless" else TINY.steps
    options = replace(TINY, steps=steps, accumulate=4 // world)
    for last in train(build(kind, seed=rank), batches, options, out, resume=True, device="cpu"):
        if case == "endless" and rank == 0:
            Path(out, "steps").write_text(str(last.step))
        if case == "stop" and last.step == 6:
            break
        if case == "killed" and last.step == 6 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    held = [p for net in last.nets.values() for p in net.parameters()]
    pieces = sum(full(p) is not p and p.to_local().numel() < p.numel() for p in held)
    total = sum(p.double().sum().item() for p in whole(last.ema).parameters())
    print(f"weights {pieces} {total} {last.logs}\n", end="", flush=True)  # at once: two processes write here


if __name__ == "__main__":
    main(*sys.argv[1:])
