"""The plain supervised loop behind the judge, the autoencoder, the text encoder and the teacher."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_MINUTES = 3.0
Loss = Callable[[torch.Generator], Tensor]


class Averages:
    """Running averages of a module's weights, one for each decay: which one is best shows after training."""

    def __init__(self, module: nn.Module, decays: tuple[float, ...]) -> None:
        self.module = module
        self.copies = {decay: copy.deepcopy(module).requires_grad_(False) for decay in decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every average towards the module; young averages move faster, (1 + step) / (10 + step)."""
        for decay, average in self.copies.items():
            away = 1 - min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), [p.data for p in self.module.parameters()], away)
            for mine, theirs in zip(average.buffers(), self.module.buffers()):
                mine.copy_(theirs)


class Run:
    """A training that can be put away and taken up again: weights, averages, optimiser, generator, time."""

    def __init__(self, averages: Averages, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> None:
        self.averages, self.optimiser, self.generator = averages, optimiser, generator
        self.step, self.minutes = 0, 0.0

    def save(self, path: Path, budget: float, falls_at: float) -> None:
        averages = {str(decay): average.state_dict() for decay, average in self.averages.copies.items()}
        state = {"module": self.averages.module.state_dict(), "avgs": averages, "opt": self.optimiser.state_dict()}
        state |= {"g": self.generator.get_state(), "step": self.step, "passed": self.minutes}
        state |= {"budget": budget, "falls_at": falls_at}
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.averages.module.load_state_dict(state["module"])
        for decay, average in self.averages.copies.items():
            average.load_state_dict(state["avgs"].get(str(decay), state["module"]))
        self.optimiser.load_state_dict(state["opt"])
        self.generator.set_state(state["g"])
        self.step, self.minutes = state["step"], state["passed"]


def fit(
    module: nn.Module,
    loss: Loss,
    minutes: float,
    lr: float,
    *,
    seed: int,
    name: str,
    work: Path | None = None,
    averages: tuple[float, ...] = (0.999,),
    fall: float = 0.35,
    warm_up: int = 100,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    every: Callable[[dict[float, nn.Module], float], None] | None = None,
) -> dict[float, nn.Module]:
    """Minimise `loss(generator)` over `module` for a time budget; returns its averages by their decay, in eval mode.

    The learning rate is flat, then falls to zero along a cosine in the last share `fall` of the budget. With a folder
    `work` the run is kept there, twice: NAME.last.pt, from which a stopped run goes on, and NAME.flat.pt from before
    the fall, from which a run of a larger budget goes on. `every(averages, minutes passed)` is called at every save.
    """
    optimiser = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=lr, betas=betas, weight_decay=weight_decay, fused=True
    )
    run = Run(Averages(module, averages), optimiser, torch.Generator().manual_seed(seed))
    falls_at = minutes * (1 - fall)
    if work is not None and (path := where_from(work, name, minutes, falls_at)):
        run.load(path)
        print(f"{name}: goes on from {path.name}, {run.minutes:.1f} min, step {run.step}", flush=True)
    start, said, saved, shown = time.monotonic() - 60 * run.minutes, run.minutes, run.minutes, 0.0
    flat = run.minutes < falls_at
    while run.minutes < minutes:
        if work is not None and flat and run.minutes >= falls_at:
            flat = False
            run.save(work / f"{name}.flat.pt", minutes, falls_at)
        done = max(0.0, (run.minutes - falls_at) / (minutes - falls_at))
        for group in optimiser.param_groups:
            group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * done)) * min(1.0, (run.step + 1) / warm_up)
        value = loss(run.generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        run.step += 1
        run.averages.update(run.step)
        run.minutes = (time.monotonic() - start) / 60
        shown = value.item() if shown == 0.0 else 0.98 * shown + 0.02 * value.item()
        if run.minutes - said > 0.5:
            said = run.minutes
            print(f"{name}: {said:.1f}/{minutes:g} min, step {run.step}, loss {shown:.5f}", flush=True)
        if work is not None and run.minutes - saved > SAVE_MINUTES:
            saved = run.minutes
            run.save(work / f"{name}.last.pt", minutes, falls_at)
            if every is not None:
                every(run.averages.copies, run.minutes)
    if work is not None:
        run.save(work / f"{name}.last.pt", minutes, falls_at)
    return {decay: average.eval() for decay, average in run.averages.copies.items()}


def where_from(work: Path, name: str, minutes: float, falls_at: float) -> Path | None:
    """The state that a run of this budget goes on from: one of the same budget, or one whose rate had not yet fallen.

    Raises ValueError where there are only states of longer runs.
    """
    passed = {}
    for path in (work / f"{name}.last.pt", work / f"{name}.flat.pt"):
        if path.exists():
            state = torch.load(path, weights_only=True, mmap=True)
            if state["budget"] == minutes or state["passed"] <= min(falls_at, state["falls_at"]):
                return path
            passed[path.name] = round(state["passed"], 1)
    if passed:
        raise ValueError(f"{work}: {passed} minutes are behind {name} already. Give more of them, or another --work.")
    return None


@contextmanager
def half_convolutions(wanted: bool | None = None) -> Iterator[None]:
    """Convolutions multiply in bfloat16, sums and all else stay in fp32: 1.5 times faster where a CPU can.

    wanted: default, where the CPU multiplies bfloat16. Half of a small U-Net's time is convolutions' backward.
    """
    if wanted is None:
        wanted = torch.cpu._is_avx512_bf16_supported()
    whole = nn.Conv2d._conv_forward

    def half(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.bfloat16()
        return whole(self, x.bfloat16(), weight.bfloat16(), bias).float()

    nn.Conv2d._conv_forward = half if wanted else whole
    try:
        yield
    finally:
        nn.Conv2d._conv_forward = whole
