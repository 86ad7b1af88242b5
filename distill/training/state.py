"""Everything that training changes: nets, optimisers, average, counters. Saved whole, so that a resume is bitwise."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..coach import Coach
from . import store

if TYPE_CHECKING:
    from .loop import TrainOptions


@dataclass
class Step:
    """One finished iteration. `ema` and `student` are the live modules: sample from them, do not change them."""

    step: int
    progress: float  # 0..1
    seconds: float
    logs: dict[str, float]
    ema: nn.Module
    student: nn.Module
    row: dict[str, float] = field(default_factory=dict)  # the mean since the last row, on the steps that log one

    @property
    def remaining(self) -> float:
        """Seconds to go, at the pace so far."""
        return self.seconds * (1 - self.progress) / max(self.progress, 1e-9)


class Run:
    """The state of a run between two steps."""

    def __init__(self, student: nn.Module, coach: Coach | None, options: TrainOptions):
        self.student, self.coach, self.options = student, coach, options
        self.ema = copy.deepcopy(student).requires_grad_(False).eval()
        self.params = {"student": [p for p in student.parameters() if p.requires_grad]}
        if coach is not None:
            self.params["coach"] = coach.parameters()
        if not self.params["student"]:
            raise ValueError("the student has nothing to train: copy it before the coach freezes it, or unfreeze it")
        lr = {"student": options.lr, "coach": options.coach_lr}
        adamw = {"betas": options.betas, "weight_decay": options.weight_decay, "fused": True}
        self.optimizers = {name: torch.optim.AdamW(p, lr=lr[name], **adamw) for name, p in self.params.items()}
        self.step, self.seconds, self.updates, self.logs = 0, 0.0, 0, {}

    def progress(self) -> float:
        o = self.options
        by_steps = self.step / o.steps if o.steps else 0.0
        return min(1.0, max(by_steps, self.seconds / (60 * o.minutes) if o.minutes else 0.0))

    def set_lr(self) -> None:
        o, p = self.options, self.progress()
        fall = max(0.0, p - o.decay_from) / max(1e-9, 1 - o.decay_from)
        scale = o.lr_end + (1 - o.lr_end) * (1 + math.cos(math.pi * fall)) / 2
        scale *= min(1.0, (self.step + 1) / (o.lr_warmup + 1))
        for name, lr in {"student": o.lr, "coach": o.coach_lr}.items():
            for group in self.optimizers[name].param_groups if name in self.optimizers else ():
                group["lr"] = lr * scale

    @torch.no_grad()
    def average(self) -> None:
        """EMA with warm-up."""
        decay = min(self.options.ema, (1 + self.updates) / (10 + self.updates))
        for mean, p in zip(self.ema.parameters(), self.student.parameters()):
            mean.lerp_(p, 1 - decay)
        for mean, b in zip(self.ema.buffers(), self.student.buffers()):
            mean.copy_(b)

    def modules(self) -> dict:
        return {"student": self.student, "ema": self.ema} | ({"coach": self.coach} if self.coach is not None else {})

    def save(self, folder: Path) -> Path:
        tensors = {f"{n}/{k}": v for n, m in self.modules().items() for k, v in m.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}_optimizer/{i}/{k}": v for k, v in state.items()}
        state = {name: getattr(self, name) for name in ("step", "seconds", "updates", "logs")}
        state["options"] = asdict(self.options)
        return store.save(folder, self.step, tensors, state, self.options.keep)

    def open(self, folder: Path, resume: bool) -> None:
        """Go on from the newest checkpoint in the folder, or see that there is none to be overwritten."""
        found = store.load(folder) if resume else None
        if found is not None:
            self.load(*found[:2])
        elif not resume and store.checkpoints(folder):
            raise FileExistsError(f"{folder} holds a run already: pass resume=True to go on with it, or another folder")

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        parts: dict[str, dict] = {}
        for key, v in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = v
        for name, module in self.modules().items():
            module.load_state_dict(parts[name])
        for name, optimizer in self.optimizers.items():
            moments: dict[int, dict] = {}
            for key, v in parts.get(f"{name}_optimizer", {}).items():
                i, _, k = key.partition("/")
                moments.setdefault(int(i), {})[k] = v
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        for name in ("step", "seconds", "updates", "logs"):
            setattr(self, name, state[name])

    def report(self, row: dict[str, float] | None = None) -> Step:
        return Step(self.step, self.progress(), self.seconds, self.logs, self.ema, self.student, row or {})
