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

SAY_MINUTES, SAVE_MINUTES = 0.5, 3.0
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

    def __init__(self, module: nn.Module, decays: tuple[float, ...], seed: int, weight_decay: float) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        self.module, self.averages = module, Averages(module, decays)
        self.optimiser = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self.minutes, self.shown = 0, 0.0, math.nan

    def step(self, loss: Loss, lr: float) -> None:
        """One step of AdamW on `loss(generator)`, and of the averages; counts the CPU's minutes."""
        start = time.process_time()
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        value = loss(self.generator)
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimiser.step()
        self.steps += 1
        self.averages.update(self.steps)
        self.shown = value.item() if math.isnan(self.shown) else 0.98 * self.shown + 0.02 * value.item()
        self.minutes += (time.process_time() - start) / 60

    def save(self, path: Path, budget: float, falls_at: float) -> None:
        averages = {str(decay): average.state_dict() for decay, average in self.averages.copies.items()}
        state = {"module": self.module.state_dict(), "avgs": averages, "opt": self.optimiser.state_dict()}
        state |= {"g": self.generator.get_state(), "step": self.steps, "passed": self.minutes}
        state |= {"budget": budget, "falls_at": falls_at}
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.module.load_state_dict(state["module"])
        for decay, average in self.averages.copies.items():
            average.load_state_dict(state["avgs"].get(str(decay), state["module"]))
        self.optimiser.load_state_dict(state["opt"])
        self.generator.set_state(state["g"])
        self.steps, self.minutes = state["step"], state["passed"]


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
    every: Callable[[dict[float, nn.Module], float], None] = lambda averages, minutes: None,
) -> dict[float, nn.Module]:
    """Minimise `loss(generator)` over `module` for a time budget; returns its averages by their decay, in eval mode.

    minutes: of one core, whatever else the machine does; two cores that work for one minute have worked for two. The
    learning rate is flat, then falls to zero along a cosine in the last share `fall` of them. With a folder `work` the
    run is kept there, twice: NAME.last.pt, from which a stopped run goes on, and NAME.flat.pt from before the fall,
    from which a run of more minutes goes on. `every(averages, minutes passed)` is called now and then, and at the end.
    """
    run, falls_at = Run(module, averages, seed, weight_decay), minutes * (1 - fall)
    if work is not None and (path := where_from(work, name, minutes, falls_at)):
        run.load(path)
        print(f"{name}: goes on from {path.name}, {run.minutes:.1f} min, step {run.steps}", flush=True)

    def keep(kind: str) -> None:
        if work is not None:
            run.save(work / f"{name}.{kind}.pt", minutes, falls_at)

    said, saved, flat = run.minutes, run.minutes, run.minutes < falls_at
    while run.minutes < minutes:
        if flat and run.minutes >= falls_at:
            flat = False
            keep("flat")
        done = max(0.0, (run.minutes - falls_at) / (minutes - falls_at))
        run.step(loss, lr * (0.5 + 0.5 * math.cos(math.pi * done)) * min(1.0, (run.steps + 1) / warm_up))
        if run.minutes - said > SAY_MINUTES:
            said = run.minutes
            print(f"{name}: {said:.1f}/{minutes:g} min, step {run.steps}, loss {run.shown:.5f}", flush=True)
        if run.minutes - saved > SAVE_MINUTES:
            saved = run.minutes
            keep("last")
            every(run.averages.copies, run.minutes)
    keep("last")
    every(run.averages.copies, run.minutes)
    return {decay: average.eval() for decay, average in run.averages.copies.items()}


def where_from(work: Path, name: str, minutes: float, falls_at: float) -> Path | None:
    """The state that a run of this budget goes on from: one of the same budget, or one whose rate had not yet fallen.

    Raises ValueError where there are only states of longer runs.
    """
    passed = {}
    for kind in ("last", "flat"):
        path = work / f"{name}.{kind}.pt"
        if path.exists():
            state = torch.load(path, weights_only=True, mmap=True)
            unfallen = kind == "flat" or state["passed"] <= state["falls_at"]
            if (kind == "last" and state["budget"] == minutes) or (unfallen and state["passed"] <= falls_at):
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
