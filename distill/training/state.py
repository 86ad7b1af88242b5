"""Everything that training changes: nets, optimisers, averages, counters. Saved whole, so that a resume is bitwise."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters import shared
from ..methods.base import Method
from . import sharding, store
from .optimizers import load_state, make_optimizer, state_tensors
from .options import TrainOptions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


@dataclass
class Step:
    """One finished iteration. Nets and averages are the live modules: sample from them, do not change them."""

    step: int
    progress: float  # 0..1
    seconds: float
    logs: dict[str, float]
    nets: dict[str, nn.Module] = field(repr=False)
    averages: dict[str, nn.Module] = field(repr=False)
    row: dict[str, float] = field(default_factory=dict, repr=False)  # mean since the last row, on steps that log one

    @property
    def student(self) -> nn.Module:
        """The student as it is now; its average is `ema`."""
        return self.nets["student"]

    @property
    def ema(self) -> nn.Module:
        """The averaged student."""
        return self.averages["student"]

    @property
    def remaining(self) -> float:
        """Seconds to go, at the pace so far."""
        return self.seconds * (1 - self.progress) / max(self.progress, 1e-9)


class Average:
    """The moving average of a net: `module`, with tensors of its own for what is trained, the net's for what is not.
    on_cpu: there, for a net of which all is trained; adapters' averages are small."""

    def __init__(self, net: nn.Module, on_cpu: bool = False):
        frozen = [p for p in net.parameters() if not p.requires_grad]
        self.module = shared(net, [*frozen, *net.buffers()] if frozen else []).requires_grad_(False).eval()
        if on_cpu and not frozen:
            self.module.to("cpu")
        self.net = net

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        ours, theirs = ((*m.parameters(), *m.buffers()) for m in (self.module, self.net))
        return [(mean, now) for mean, now in zip(ours, theirs) if mean is not now]

    @torch.no_grad()
    def take(self, decay: float) -> None:
        """Move towards the net as it is now; buffers are copied."""
        for mean, now in self._pairs:
            here = now.to(mean.device)
            mean.lerp_(here, 1 - decay) if isinstance(now, nn.Parameter) else mean.copy_(here)

    def state_dict(self) -> dict[str, Tensor]:
        """Its own tensors, by name."""
        own = {id(mean) for mean, _ in self._pairs}
        return {n: v.detach() for n, v in self.module.state_dict(keep_vars=True).items() if id(v) in own}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave. Raises KeyError or RuntimeError for another net's."""
        with torch.no_grad():
            for name, mean in self.state_dict().items():
                mean.copy_(state[name])


class Run:
    """The state of a run between two steps.

    identity: what the run is about (method, teacher, ...), JSON; a saved run of another identity is not gone on with.
    mesh: the processes that nets are sharded over.
    """

    def __init__(
        self,
        method: Method,
        options: TrainOptions,
        identity: Mapping[str, Any] | None = None,
        mesh: DeviceMesh | None = None,
    ):
        self.options, self.method_options = options, asdict(getattr(method, "options", None) or options)
        self.nets = dict(method.nets)
        averaged = {name: net.module for name, net in self.nets.items() if net.average}
        self.kept = {} if options.ema is None else {n: Average(m, options.ema_on_cpu) for n, m in averaged.items()}
        self.averages = averaged | {name: average.module for name, average in self.kept.items()}
        if mesh is not None:  # before anything holds a parameter
            sharding.shard_all(self.nets, self.averages, mesh)
        self.params = {name: net.parameters() for name, net in self.nets.items()}
        for name, params in self.params.items():
            if not params:
                raise ValueError(f"the {name} has nothing to train: copy it before a coach freezes it, or unfreeze it")
        self.optimizers = {n: make_optimizer(options, p, self.nets[n].lr) for n, p in self.params.items()}
        self.step, self.seconds, self.logs, self.sums = 0, 0.0, {}, {}
        self.updates = dict.fromkeys(self.averages, 0)
        self.identity = {"method": type(method).__name__, **(identity or {})}

    def about(self) -> dict[str, Any]:
        """The options of the run, the loop's and the method's."""
        return asdict(self.options) | self.method_options

    def progress(self) -> float:
        """0 to 1, by steps or by the clock, whichever is further."""
        o = self.options
        by_steps = self.step / o.steps if o.steps else 0.0
        return min(1.0, max(by_steps, self.seconds / (60 * o.minutes) if o.minutes else 0.0))

    def set_lr(self) -> None:
        """Linear rise, then flat, then along a cosine down to lr_end, each net from its own learning rate."""
        o, p = self.options, self.progress()
        fall = max(0.0, p - o.decay_from) / max(1e-9, 1 - o.decay_from)
        scale = o.lr_end + (1 - o.lr_end) * (1 + math.cos(math.pi * fall)) / 2
        scale *= min(1.0, (self.step + 1) / (o.lr_warmup + 1))
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.nets[name].lr * scale

    def average(self, name: str) -> None:
        """The moving average of a net takes in its weights as they are now."""
        if name in self.kept:
            self.updates[name] += 1
            self.kept[name].take(min(self.options.ema, (1 + self.updates[name]) / (10 + self.updates[name])))

    def summed(self, every: int) -> dict[str, float]:
        """Add the last logs to the window; every so many steps, and at the end, the window's mean, else {}."""
        for name, value in self.logs.items():
            self.sums.setdefault(name, []).append(value)
        if self.step % every and self.progress() < 1:
            return {}
        row = {name: sum(values) / len(values) for name, values in self.sums.items()} | {"seconds": self.seconds}
        self.sums.clear()
        return row

    # ------------------------------------------------------------------------------------------ saved and loaded

    def _parts(self) -> dict[str, Any]:
        averages = {f"{name}_average": average for name, average in self.kept.items()}
        return {name: net.trained for name, net in self.nets.items()} | averages

    def save(self, folder: Path, write: bool = True) -> None:
        """Write a checkpoint. Of several processes one writes; where nets are sharded the others have to lend it their
        pieces."""
        tensors = {f"{n}/{k}": v for n, part in self._parts().items() for k, v in part.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= {f"{name}_optimizer/{k}": v for k, v in state_tensors(optimizer).items()}
        state = {name: getattr(self, name) for name in ("step", "seconds", "updates", "logs", "sums", "identity")}
        state["options"] = self.about()
        tensors = sharding.gathered(tensors, write)
        if write:
            store.save(folder, self.step, tensors, state, self.options.keep)

    def open(self, folder: Path, resume: bool) -> None:
        """Go on from the newest checkpoint in the folder, or see that there is none to be overwritten."""
        found = store.load(folder) if resume else None
        if found is not None:
            self.recognise(found[1], folder)
            self.load(*found[:2])
            self.tell(found[1])
        elif resume and store.checkpoints(folder):
            raise ValueError(f"{folder}: none of its checkpoints can be read: name another folder, or remove it")
        elif not resume and store.checkpoints(folder):
            raise FileExistsError(f"{folder} holds a run already: resume it, or name another folder")

    def recognise(self, state: dict, folder: Path) -> None:
        """Raise ValueError where the saved run is about something else."""
        saved = state.get("identity", {})
        for name in {**self.identity, **saved}:
            before, now = saved.get(name), self.identity.get(name)
            if before != now:
                cure = f"resume it with {name} {before!r}, or name another folder"
                raise ValueError(f"{folder} holds a run with {name} {before!r}, not {now!r}: {cure}")

    def tell(self, state: dict) -> None:
        """Log which options are not those of the saved run."""
        for name, now in json.loads(json.dumps(self.about())).items():
            before = state["options"].get(name, now)
            if before != now:
                log.warning("resumed with %s %s; it was %s", name, now, before)

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Put everything back. Raises ValueError where a net does not fit."""
        parts: dict[str, dict] = {}
        for key, v in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = v
        for name, part in self._parts().items():
            try:
                part.load_state_dict(sharding.cut(parts[name], part.state_dict()))
            except (KeyError, RuntimeError) as error:
                raise ValueError(f"the saved {name} does not fit this run's: {error}") from None
        for name, optimizer in self.optimizers.items():
            moments = parts.get(f"{name}_optimizer", {})
            of = {key: self.params[name][int(key.partition("/")[0])] for key in moments}
            load_state(optimizer, sharding.cut(moments, of))
        for name in ("step", "seconds", "updates", "logs", "sums"):
            setattr(self, name, state[name])

    def report(self, row: dict[str, float] | None = None) -> Step:
        """What the loop yields."""
        nets = {name: net.module for name, net in self.nets.items()}
        return Step(self.step, self.progress(), self.seconds, self.logs, nets, self.averages, row or {})
