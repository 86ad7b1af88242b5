"""The training loop: one generator for every method. The command line prints what it yields, a notebook draws it.

    for step in train(method, batches, TrainOptions(steps=1000), out="runs/mine", resume=True):
        print(step.step, step.logs, step.remaining)

Every step seeds its own random generators from (seed, step, process). So there is no random state to save, any step can
be replayed alone, and a resumed run is bitwise the run that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from ..checks import need
from ..methods.base import Batches, Method, Phase
from . import records, sharding
from .options import TrainOptions
from .processes import part_at_exit
from .state import Run, Step
from .stopping import undivided

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

OTHERS = ("DEEPSPEED", "MEGATRON_LM")
"""What accelerate can be told to do, and this loop does not."""


class Diverged(RuntimeError):
    """Training stopped making sense. readout and value say what was seen, cure what most likely helps."""

    def __init__(self, step: int, readout: str, value: float, nets: Iterable[str] = ("student", "coach")):
        self.step, self.readout, self.value, self.cure = step, readout, value, cure(readout, nets)
        super().__init__(f"step {step}: {readout} is {value:g}. Likely cure: {self.cure}.")


def cure(readout: str, nets: Iterable[str]) -> str:
    """What most likely helps a run of these nets (docs/theory.md, "When it goes wrong")."""
    if "coach" in nets:
        if readout.startswith("coach_") and readout != "coach_ratio":
            return "lower coach_lr, or raise coach_warmup so that the coach meets the student slowly"
        if readout.startswith(("x_", "rel_gap")):
            return "the coach lost the student: more coach_steps, then a higher coach_lr, then a lower lr or guidance"
        return "lower lr; if it happens in the first steps, raise t_min (the gradient is not finite near t = 0)"
    return "lower lr"


# ----------------------------------------------------------------------------------------------------- the loop


def train(
    method: Method,
    batches: Batches,
    options: TrainOptions,
    out: str | Path | None = None,
    resume: bool = False,
    *,
    device: str | torch.device | None = None,
    identity: Mapping[str, Any] | None = None,
    sheet: Callable[[nn.Module], Image] | None = None,
) -> Iterator[Step]:
    """Train the method's nets in place, phase by phase.

    batches(step, generator) -> the method's batch, drawn from the generator alone; tensors may be on any device.
    out: folder for checkpoints/, log.csv and TensorBoard files. resume: go on from the newest readable checkpoint
    there, if any; without it a folder that holds a run is refused (FileExistsError). device: default what accelerate
    finds. identity: what the run is about (teacher, coach, ...), JSON; a saved run of another identity or method is
    refused (ValueError), one with other options goes on with the new ones and says so. A run that had ended yields
    its last step again. sheet(the average student) -> a picture for sheets/, every options.sheet_every steps.

    Weights enter the average only after their own samples and losses were seen to be finite, so the average of a run
    that raises Diverged is its last good one. Ctrl-C, break and close() leave a checkpoint of the last whole step (keep
    no reference to the generator, or close it). With `minutes` the clock decides the learning rates, so only runs by
    `steps` repeat bitwise.

    Several processes (accelerate launch, torchrun; without GPUs device="cpu") start from the first one's weights and
    average their gradients. n of them do what one does with n times `accumulate`; where one is asked to stop, all do
    after the same step. Where accelerate was launched with FSDP2, trained nets are sharded (`sharding`): all processes
    have to look at a Step's nets together.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=str(device) == "cpu")
    part_at_exit()
    kind = accelerator.distributed_type.value
    need(kind not in OTHERS, "distributed_type", kind, "launch with --multi_gpu, or --use_fsdp --fsdp_version 2")
    device = torch.device(device) if device else accelerator.device
    mesh = sharding.mesh_of(accelerator, device, options)
    for net in method.nets.values():
        net.module.to(device)
    prepare(method, options)
    _share(method, accelerator)
    run = Run(method, options, identity, mesh)
    folder = Path(out) / "checkpoints" if out is not None else None
    if folder is not None:
        run.open(folder, resume)
    keep = folder is not None and accelerator.is_main_process
    helps = keep or mesh is not None  # with what one process keeps
    recorders = records.recorders(Path(out), run.step, options.tracker, run.about()) if keep else []
    clock, between = time.monotonic() - run.seconds, True
    try:
        with undivided() as stop:
            if run.progress() == 1:
                yield run.report()
            while run.progress() < 1:
                between = False
                run.logs = _iteration(run, method, batches, accelerator, device)
                run.step += 1
                run.seconds, asked = _agree(time.monotonic() - clock, stop.asked, accelerator)
                between, row = True, run.summed(options.log_every)
                page = sheet(run.averages["student"]) if sheet and helps and _due(run, options.sheet_every) else None
                for recorder in recorders:
                    recorder.row(run.step, row)
                    if page is not None:
                        recorder.sheet(run.step, page)
                if folder and helps and _due(run, options.save_every):
                    run.save(folder, keep)
                try:
                    yield run.report(row)
                finally:
                    stop.let_through(asked if accelerator.num_processes > 1 else stop.asked)
    except (KeyboardInterrupt, GeneratorExit):
        if folder and helps and between:  # never half a step: a second Ctrl-C leaves the checkpoint before
            run.save(folder, keep)
        raise


def _due(run: Run, every: int | None) -> bool:
    """Whether something that is done every so many steps, and at the end, is due."""
    return every is not None and (run.step % every == 0 or run.progress() == 1)


def prepare(method: Method, options: TrainOptions) -> None:
    """Nets compute as the options say, and what is trained is float32. Raises ValueError for a net that cannot."""
    for name, net in method.nets.items():
        for p in net.parameters():
            p.data = p.data.float()
        inside = [m for m in net.module.modules() if hasattr(m, "enable_gradient_checkpointing")]
        if options.gradient_checkpointing:
            need(bool(inside), "gradient_checkpointing", True, f"the {name} is no net of diffusers and has none")
            for module in inside:
                module.enable_gradient_checkpointing()
        if options.compile:
            for module in inside or [net.module]:
                module.compile()  # in place: the names of its weights stay


def _iteration(
    run: Run, method: Method, batches: Batches, accelerator: Accelerator, device: torch.device
) -> dict[str, float]:
    """The method's phases, once. Batches are numbered over all processes and each has its own generators, so that two
    processes do what one does with twice as many batches a step."""
    o = run.options
    numbers = [accelerator.process_index * o.accumulate + i for i in range(o.accumulate)]
    draws = [seeded("cpu", o.seed, run.step, n, 0) for n in numbers]
    noises = [seeded(device, o.seed, run.step, n, 1) for n in numbers]
    run.set_lr()
    logs: dict[str, float] = {}
    drawn: list[dict] = []
    for phase in method.phases(run.step):
        if phase.fresh or not drawn:
            drawn = [placed(batches, device)(run.step, draw) for draw in draws]
        logs |= _update(run, phase, drawn, noises, accelerator, device)
    method.after(run.step, run.averages)
    return logs


def _update(
    run: Run, phase: Phase, drawn: list[dict], noises: list[Generator], accelerator: Accelerator, device: torch.device
) -> dict[str, float]:
    """One optimiser step on one net; its readouts, as means over all batches. Raises Diverged, in every process,
    before anything is changed."""
    o, name, params = run.options, phase.net, run.params[phase.net]
    run.optimizers[name].zero_grad(set_to_none=True)
    seen: list[Tensor] = []
    for batch, noise in zip(drawn, noises):
        with torch.autocast(device.type, torch.bfloat16, enabled=o.precision == "bf16"):
            loss, readouts = phase.loss(batch, noise)
        (loss / len(drawn)).backward()
        seen.append(torch.stack([v.detach().float() for v in (loss, *readouts.values())]))
    means = torch.stack(seen).mean(0)
    if accelerator.num_processes > 1:  # by hand: nets that call each other do not fit DDP's hooks
        means = accelerator.reduce(means, "mean")
        for p in sharding.uncut(params):
            p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
    norm = sharding.full(nn.utils.clip_grad_norm_(params, o.clip).detach()).float()
    logs = dict(zip([*readouts, f"{name}_grad_norm"], torch.cat([means[1:], norm[None]]).tolist()))
    _check(run, logs)
    run.average(name)
    run.optimizers[name].step()
    return logs


def _check(run: Run, logs: dict[str, float]) -> None:
    for name, value in logs.items():
        if not math.isfinite(value):
            raise Diverged(run.step + 1, name, value, run.nets)
    if logs.get("x_std", 0.0) > run.options.max_spread:
        raise Diverged(run.step + 1, "x_std", logs["x_std"], run.nets)


# ----------------------------------------------------------------------------------------------------- the rest


def seeded(device: str | torch.device, *numbers: int) -> Generator:
    """A generator from some numbers, mixed so that neighbours share nothing (splitmix64)."""
    h = 0
    for n in numbers:
        h = (h + n + 0x9E3779B97F4A7C15) % 2**64
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ h >> 27) * 0x94D049BB133111EB % 2**64
        h ^= h >> 31
    return torch.Generator(device=device).manual_seed(h % 2**63)


def placed(batches: Batches, device: torch.device) -> Batches:
    """The same batches with their tensors on a device, which they name."""
    return lambda step, generator: _to(batches(step, generator), device) | {"device": device}


def _to(tree: Any, device: torch.device) -> Any:
    """Tensors of a nested batch to the device; everything else as it is."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {k: _to(v, device) for k, v in tree.items()}
    if isinstance(tree, list | tuple) and any(isinstance(v, Tensor | Mapping) for v in tree):
        return type(tree)(_to(v, device) for v in tree)
    return tree


@torch.no_grad()
def _share(method: Method, accelerator: Accelerator) -> None:
    """Every process starts from the first one's weights."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    for net in method.nets.values():
        for p in net.parameters():
            p.copy_(broadcast(p.data.clone()))


def _agree(seconds: float, asked: list[int], accelerator: Accelerator) -> tuple[float, list[int]]:
    """(the slowest process's clock, a signal that any of them was sent), the same in all."""
    if accelerator.num_processes == 1:
        return seconds, asked
    mine = torch.tensor([seconds, asked[0] if asked else 0], dtype=torch.float64, device=accelerator.device)
    slowest, signum = accelerator.gather(mine[None]).amax(0).tolist()
    return slowest, [int(signum)] if signum else []
