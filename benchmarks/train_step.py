"""What the training loop costs beside the passes that a step of VSD needs: their times alone, and a whole step's.

    python benchmarks/train_step.py [MODEL] [--batch 8] [--runs 15] [--threads 1]

MODEL is a file or folder, by default the bundled teacher. Passes, each of the net alone: the student forwards and
backwards; the guided teacher (a doubled batch) and the coach forwards; the coach forwards and backwards. A step has
losses, clipping, two optimisers, the average and the readouts on top. All are timed in turn, in one process; medians in
milliseconds as JSON, and the ratio of a step to the sum of its passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from distill.backbones import load
from distill.denoiser import map_cond
from distill.methods.vsd import VSDOptions
from distill.training.batches import prompt_batches
from distill.training.loop import train
from distill.training.options import TrainOptions
from distill.training.students import assemble
from distill.tutorial.bundled import find


def passes(model, method, batch: int) -> dict[str, Callable[[], None]]:
    """The forward and backward passes of a step, by name."""
    cond = model.encode(["a red ring"] * batch)
    twice = map_cond(lambda c: torch.cat([c, c]), cond)
    x, t = torch.randn(model.shape(batch), device=model.device), torch.full((batch,), 0.5, device=model.device)
    two, late = torch.cat([x, x]), torch.cat([t, t])

    def learn(denoiser, net) -> Callable[[], None]:
        def call() -> None:
            denoiser(x, t, cond).square().mean().backward()
            for p in net.parameters():
                p.grad = None

        return call

    @torch.no_grad()
    def look(denoiser, x, t, cond) -> None:
        denoiser(x, t, cond)

    return {
        "student, both ways": learn(method.student.denoiser, method.student),
        "teacher, guided": lambda: look(method.teacher, two, late, twice),
        "coach": lambda: look(method.coach.denoiser, x, t, cond),
        "coach, both ways": learn(method.coach.denoiser, method.coach),
    }


def measure(name: str, batch: int, runs: int) -> dict:
    """Medians over `runs`, the first three left out."""
    model = load(find(name), "cuda" if torch.cuda.is_available() else "cpu")
    training = TrainOptions(steps=10**6, max_spread=1e6)
    method = assemble(model, VSDOptions(rank=8, guidance=2.0, lr=1e-6, coach_lr=1e-6), training)
    steps = train(method, prompt_batches(model, ["a red ring"], batch), training, device=model.device)
    work = {"step": lambda: next(steps), **passes(model, method, batch)}
    times: dict[str, list[float]] = {what: [] for what in work}
    for _ in range(runs + 3):
        for what, do in work.items():
            start = time.perf_counter()
            do()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times[what].append(1000 * (time.perf_counter() - start))
    ms = {what: statistics.median(seen[3:]) for what, seen in times.items()}
    ratio = ms["step"] / sum(v for what, v in ms.items() if what != "step")
    told = {"model": model.name, "batch": batch, "threads": torch.get_num_threads(), "device": str(model.device)}
    return told | {"ms": {what: round(v, 1) for what, v in ms.items()}, "ratio": round(ratio, 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="teacher")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.model, options.batch, options.runs), indent=1))
