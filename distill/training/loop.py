"""The training loop: one generator for every method. The command line prints what it yields, a notebook draws it.

    for step in train(method, student, coach, batches, options, out="runs/mine", resume=True):
        print(step.step, step.logs, step.remaining)

Every step seeds its own random generators from (seed, step, process). So there is no random state to save, any step can
be replayed alone, and a resumed run is bitwise the run that was never stopped.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from ..coach import Coach
from . import store
from .state import Run, Step

Batches = Callable[[int, Generator], dict]  # (step, generator) -> what the method's losses take


@dataclass(frozen=True)
class TrainOptions:
    steps: int | None = 2000
    """Iterations, coach warm-up included. None: only `minutes` ends the run."""
    minutes: float | None = None
    """Time budget; the run ends at whichever of the two comes first, and the learning rate falls in step with it."""
    lr: float = 2e-4
    """Student. Tutorial world: 2e-4 after regression, 5e-4 from the teacher, 1e-3 for regression; SD eps-nets: 1e-6."""
    coach_lr: float = 2e-3
    """Coach. LoRA 2e-3, full copy 1e-3 (tutorial world); SwiftBrush LoRA 1e-3. It has to outrun the student 4 times."""
    betas: tuple[float, float] = (0.5, 0.99)
    """AdamW, both nets: little momentum, as the target moves (tutorial world; SiD has beta1 = 0)."""
    weight_decay: float = 0.01
    """AdamW, both nets (DMD2)."""
    clip: float = 1.0
    """Largest gradient norm, both nets (SwiftBrush)."""
    lr_warmup: int = 0
    """Steps of linear rise (DMD2: 500 at SD's size)."""
    decay_from: float = 0.5
    """The learning rates fall along a cosine after this fraction of the run (tutorial world)."""
    lr_end: float = 0.0
    """What is left of the learning rates at the end, as a fraction."""
    ema: float = 0.99
    """Decay of the averaged student, after a warm-up of min(ema, (1 + n) / (10 + n)) (tutorial world)."""
    coach_steps: int = 1
    """Coach steps per student step (SwiftBrush 1, DMD2 5): the smallest at which x_mean and x_std hold still."""
    coach_warmup: int = 0
    """Iterations of the coach alone at the start; without them the first student steps have no direction."""
    accumulate: int = 1
    """Batches per step, for both nets."""
    log_every: int = 10
    """Iterations per row of log.csv; a row is the mean over them."""
    save_every: int = 100
    """Iterations per checkpoint: what a killed process loses at most."""
    keep: int = 2
    """Checkpoints kept."""
    seed: int = 0
    """Of every random number in the run."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast of the nets' insides (losses stay fp32). No fp16: the loss is a difference of near equals (SiD-LSG)."""
    device: str | None = None
    """"cpu" to stay there; default: what accelerate finds."""
    max_spread: float = 10.0
    """Stop when the samples' standard deviation exceeds this; latents have about 1 by the file contract."""


class Diverged(RuntimeError):
    """Training stopped making sense. readout and value say what was seen, cure what most likely helps."""

    def __init__(self, step: int, readout: str, value: float):
        self.step, self.readout, self.value, self.cure = step, readout, value, cure(readout)
        super().__init__(f"step {step}: {readout} is {value:g}. Likely cure: {self.cure}.")


def cure(readout: str) -> str:
    """reference/distillation.md, section 3."""
    if readout.startswith("coach_") and readout != "coach_ratio":
        return "lower coach_lr, or raise coach_warmup so that the coach meets the student slowly"
    if readout.startswith(("x_", "rel_gap")):
        return "the coach has lost the student: more coach_steps, then a higher coach_lr, then a lower lr or guidance"
    return "lower lr; if it happens in the first steps, raise t_min (the gradient is not finite near t = 0)"


# ----------------------------------------------------------------------------------------------------- the loop


def train(
    method,
    student: nn.Module,
    coach: Coach | None,
    batches: Batches,
    options: TrainOptions,
    out: str | Path | None = None,
    resume: bool = False,
) -> Iterator[Step]:
    """Train `student` (in place) by method.student_loss and, if there is one, `coach` by method.coach_loss.

    batches(step, generator) -> the method's batch, drawn from the generator alone; tensors may be on any device.
    out: folder for checkpoints/, log.csv and TensorBoard files. resume: go on from the newest readable checkpoint
    there, if any; without it a folder that holds a run is refused (FileExistsError). A run resumed with other options
    goes on with the new ones; one that had ended yields its last step again.

    Ctrl-C, break and close() leave a checkpoint of the last whole step (keep no reference to the generator, or close
    it). With `minutes` the clock decides the learning rates, so only runs by `steps` repeat bitwise. Raises Diverged.

    Several processes (accelerate launch, torchrun; without GPUs device="cpu") average their gradients.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=options.device == "cpu")
    device = torch.device(options.device) if options.device else accelerator.device
    student.to(device)
    if coach is not None:
        coach.module.to(device)
    run = Run(student, coach, options)
    folder = Path(out) / "checkpoints" if out is not None else None
    if folder is not None:
        run.open(folder, resume)
    writers = store.writers(Path(out), run.step) if out is not None and accelerator.is_main_process else []
    keep = folder is not None and accelerator.is_main_process
    sums: dict[str, list[float]] = {}
    clock, between = time.monotonic() - run.seconds, True
    try:
        if run.progress() == 1:
            yield run.report()
        while run.progress() < 1:
            with whole():
                between = False
                run.logs = _iteration(run, method, batches, accelerator, device)
                run.step += 1
                run.seconds = _agree(time.monotonic() - clock, accelerator)
                between, row = True, {}
                for name, value in run.logs.items():
                    sums.setdefault(name, []).append(value)
                if run.step % options.log_every == 0 or run.progress() == 1:
                    row = {name: sum(values) / len(values) for name, values in sums.items()} | {"seconds": run.seconds}
                    sums.clear()
                    for write in writers:
                        write(run.step, row)
                if keep and (run.step % options.save_every == 0 or run.progress() == 1):
                    run.save(folder)
            yield run.report(row)
    except (KeyboardInterrupt, GeneratorExit):
        if keep and between:  # never half a step: a second Ctrl-C leaves the checkpoint before
            run.save(folder)
        raise


def _iteration(run: Run, method, batches: Batches, accelerator, device: torch.device) -> dict[str, float]:
    """One student step, then the coach's."""
    o, logs = run.options, {}
    rank = accelerator.process_index
    draw, noise = seeded("cpu", o.seed, run.step, rank, 0), seeded(device, o.seed, run.step, rank, 1)
    run.set_lr()

    def fresh() -> list[dict]:
        return [_to(batches(run.step, draw), device) | {"device": device} for _ in range(o.accumulate)]

    def update(name: str, loss_of: Callable, drawn: list[dict]) -> None:
        run.optimizers[name].zero_grad(set_to_none=True)
        for batch in drawn:
            with torch.autocast(device.type, torch.bfloat16, enabled=o.precision == "bf16"):
                loss, readouts = loss_of(batch, noise)
            (loss / len(drawn)).backward()
        params = run.params[name]
        if accelerator.num_processes > 1:  # by hand: two nets that call each other do not fit DDP's hooks
            for p in params:
                p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
        logs.update(readouts, **{f"{name}_grad_norm": nn.utils.clip_grad_norm_(params, o.clip)})
        run.optimizers[name].step()

    drawn = None
    if method.coach_loss is None or run.step >= o.coach_warmup:
        drawn = fresh()
        update("student", method.student_loss, drawn)
        run.updates += 1
        run.average()
    for _ in range(o.coach_steps if method.coach_loss is not None else 0):
        update("coach", method.coach_loss, drawn or fresh())  # the first sees the student's batch, and may share it
        drawn = None
    values = dict(zip(logs, torch.stack([v.detach().float() for v in logs.values()]).tolist()))
    _check(run, values)
    return values


def _check(run: Run, logs: dict[str, float]) -> None:
    for name, value in logs.items():
        if not math.isfinite(value):
            raise Diverged(run.step + 1, name, value)
    if logs.get("x_std", 0.0) > run.options.max_spread:
        raise Diverged(run.step + 1, "x_std", logs["x_std"])


# ----------------------------------------------------------------------------------------------------- the rest


def seeded(device, *numbers: int) -> Generator:
    """A generator from some numbers, mixed so that neighbours share nothing (splitmix64)."""
    h = 0
    for n in numbers:
        h = (h + n + 0x9E3779B97F4A7C15) % 2**64
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ h >> 27) * 0x94D049BB133111EB % 2**64
        h ^= h >> 31
    return torch.Generator(device=device).manual_seed(h % 2**63)


@contextmanager
def whole() -> Iterator[None]:
    """Ctrl-C waits for the end of the block (a second one does not)."""
    old = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(old):
        yield
        return
    asked: list[int] = []

    def wait(signum, frame):
        if asked:
            old(signum, frame)
        asked.append(signum)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
    if asked:
        old(asked[0], None)


def _to(tree, device: torch.device):
    if isinstance(tree, Tensor):
        return tree.to(device)
    return {k: _to(v, device) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _agree(seconds: float, accelerator) -> float:
    """The main process's clock decides for all."""
    if accelerator.num_processes == 1:
        return seconds
    from accelerate.utils import broadcast

    return float(broadcast(torch.tensor(seconds, device=accelerator.device)))
