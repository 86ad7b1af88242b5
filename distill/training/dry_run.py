"""What a run would take, before it is run: parameters, memory part by part, and which options would make it fit.

What stays is counted; what a step takes beyond it is measured at batches of one and two, and is a straight line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..methods.base import Batches, Method
from ..shards import leaves
from .loop import placed, prepare, seeded, train
from .meter import Meter, capacity
from .options import TrainOptions

Source = Callable[[int], Batches]
"""How many samples -> batches of so many, as the method's `data` takes them."""


class Weights:
    """Tensors that were seen, each counted once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def add(self, *modules: nn.Module) -> tuple[int, int]:
        """(numbers, bytes) of the modules' tensors that were not seen yet."""
        numbers = size = 0
        for tensor in (t for m in modules for t in (*m.parameters(), *m.buffers())):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                numbers, size = numbers + tensor.numel(), size + storage.nbytes()
        return numbers, size


@dataclass
class DryRun:
    """method: assembled of the teacher as for a run. source: see Source. Nets move a few steps: throw them away."""

    teacher: Backbone
    method: Method
    source: Source
    batch_size: int
    options: TrainOptions

    @cached_property
    def parts(self) -> dict[str, tuple[int, int]]:
        """What stays on the device, by name: (parameters, bytes)."""
        prepare(self.method, self.options)
        weights, kind = Weights(), self.device.type
        found = {"teacher": weights.add(self.teacher.net)}
        found |= {name: weights.add(net.module) for name, net in self.method.nets.items()}
        rest = [m for name, m in self.teacher.parts.items() if name != self.teacher.main]
        here = [m for m in rest if next(m.parameters()).device.type == kind]
        found["text encoders, VAE"] = weights.add(*here)
        for name, net in self.method.nets.items():
            trained = net.parameters()
            size = sum(p.nbytes for p in trained)
            found[f"{name}: gradients"] = 0, size
            found[f"{name}: moments, {self.options.optimizer}"] = 0, 2 * sum(map(self.moment, trained))
            elsewhere = self.options.ema_on_cpu and kind != "cpu"
            if net.average and self.options.ema is not None and not elsewhere:
                found[f"{name}: average"] = 0, size
        return {name: v for name, v in found.items() if v[1]}

    @property
    def device(self) -> torch.device:
        """Where it would run."""
        return self.teacher.device

    def moment(self, p: Tensor) -> int:
        """Bytes of one of the optimiser's two moments: bitsandbytes keeps small tensors in 32 bits."""
        return p.numel() if self.options.optimizer == "adamw8bit" and p.numel() >= 4096 else 4 * p.numel()

    @property
    def stay(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, size in self.parts.values())

    @cached_property
    def there(self) -> int:
        """Bytes of the device's memory."""
        return capacity(self.device)

    @cached_property
    def step(self) -> tuple[int, int]:
        """(bytes of a step beyond what stays, at a batch of none; for each sample)."""
        return self.measure(self.options)

    def data(self, count: int) -> Batches:
        """Batches of so many samples, nothing kept on disk."""
        source = placed(self.source(count), self.device)
        return self.method.data(source, seeded("cpu", 0), None, lambda what, share, **readouts: None)

    def measure(self, options: TrainOptions) -> tuple[int, int]:
        """As `step`, for these options. Steps are made."""
        sources = {n: self.data(n) for n in (1, 2)}
        now = [1]
        endless = replace(options, steps=10**9, minutes=None, accumulate=1, max_spread=1e30, compile=False)
        steps = train(self.method, lambda i, g: sources[now[0]](i, g), endless, device=self.device)
        next(steps)  # the optimiser's moments come into being
        peaks = []
        for now[0] in (1, 2):
            grads = [p.grad for net in self.method.nets.values() for p in net.parameters() if p.grad is not None]
            with Meter(self.device, grads) as meter:
                del grads
                next(steps)
            peaks.append(meter.peak)
        steps.close()
        each = max(0, peaks[1] - peaks[0])
        return max(0, peaks[0] - each), each

    def total(self, batch_size: int | None = None, step: tuple[int, int] | None = None) -> int:
        """Bytes at the peak."""
        base, each = step or self.step
        return self.stay + base + each * (batch_size or self.batch_size)

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """The first batch: names and shapes."""
        batch = self.data(self.batch_size)(0, seeded("cpu", 0))
        found = {}
        for name, value in batch.items():
            tensors = [] if name in ("shape", "device") else leaves(value)
            found |= {name if len(tensors) == 1 else f"{name} {i}": list(t.shape) for i, t in enumerate(tensors)}
        return found | {"samples": list(batch.get("shape", batch.get("x0", torch.empty(0)).shape))}

    def cures(self) -> list[str]:
        """The options that make it fit, the least harmful first; [] where none do."""
        o, size, step, found = self.options, self.total(), self.step, []
        moments = sum(v for name, (_, v) in self.parts.items() if ": moments" in name)
        averages = sum(v for name, (_, v) in self.parts.items() if name.endswith(": average"))
        if not o.gradient_checkpointing and any(hasattr(m, "enable_gradient_checkpointing") for m in self.nets()):
            step = min(step, self.measure(replace(o, gradient_checkpointing=True)), key=lambda s: self.total(step=s))
            found.append("--gradient-checkpointing")
            size = self.total(step=step)
        if size > self.there and averages and self.device.type != "cpu":
            found.append("--ema-on-cpu")
            size -= averages
        if size > self.there and o.optimizer == "adamw" and self.device.type == "cuda":
            found.append("--optimizer adamw8bit")
            size -= moments * 3 // 4
        if size > self.there:
            fixed = size - step[1] * self.batch_size
            fits = (self.there - fixed) // step[1] if step[1] else 0
            if fits < 1:
                return []
            found.append(f"--batch-size {fits} --accumulate {-(-self.batch_size * o.accumulate // fits)}")
        return found

    def nets(self) -> list[nn.Module]:
        """All modules of all nets."""
        return [m for net in self.method.nets.values() for m in net.module.modules()]

    def lines(self) -> list[str]:
        """A table: parts, their sum, the first batch, and the verdict."""
        base, each = self.step
        rows = [(name, f"{n / 1e6:,.1f} M" if n else "", size) for name, (n, size) in self.parts.items()]
        rows.append((f"a step of {self.batch_size} beside it", f"{amount(each)} each", base + each * self.batch_size))
        rows.append(("in all", "", self.total()))
        told = [f"{name:<34}{count:>14}{amount(size):>12}" for name, count, size in rows]
        told += ["", "first batch: " + "; ".join(f"{name} {tuple(shape)}" for name, shape in self.shapes.items())]
        where = f"{self.device} has {amount(self.there)}"
        if self.fits:
            return [*told, f"{where}: it fits"]
        cures = " ".join(self.cures())
        otherwise = "no option makes it fit: LoRA for student and coach, a smaller teacher, or a larger device"
        return [*told, f"{where}: it does not fit; " + (f"with {cures} it does" if cures else otherwise)]

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough."""
        return self.total() <= self.there


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
