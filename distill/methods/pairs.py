"""Pairs (z, x0) of a teacher's solver, in memory and on disk: data for regression and whatever else learns its map."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from ..atomic import write_beside
from ..denoiser import Cond, Denoiser, map_cond
from ..sample import solve
from ..schedule import randn
from .base import Batches, Told


@dataclass(frozen=True)
class Pairs:
    """z (N, ...), cond of N rows, x0 (N, ...); call it as the loop calls any source of batches."""

    z: Tensor
    cond: Cond
    x0: Tensor
    batch_size: int

    def __len__(self) -> int:
        return len(self.z)

    def __call__(self, step: int, generator: Generator) -> dict:
        rows = torch.randint(len(self), (self.batch_size,), generator=generator, device=generator.device)
        rows = rows.to(self.z.device)
        return {"z": self.z[rows], "cond": map_cond(lambda c: c[rows], self.cond), "x0": self.x0[rows]}

    def save(self, path: Path) -> None:
        """Write atomically, as safetensors; conditions may be nested dicts."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"z": self.z, "x0": self.x0, **_flat(self.cond, "cond")}
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        write_beside(path, lambda temporary: save_file(tensors, temporary, {"batch_size": str(self.batch_size)}))

    @classmethod
    def load(cls, path: Path) -> Pairs | None:
        """The pairs of `save`; None where the file is absent or unreadable."""
        try:
            with safe_open(path, framework="pt") as f:
                tensors, batch_size = {k: f.get_tensor(k) for k in f.keys()}, int(f.metadata()["batch_size"])
            z, x0 = tensors.pop("z"), tensors.pop("x0")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        cond: dict = {}
        for name, v in tensors.items():
            *parents, leaf = name.split("/")[1:]
            inner = cond
            for p in parents:
                inner = inner.setdefault(p, {})
            inner[leaf] = v
        return cls(z, cond or None, x0, batch_size)


def _flat(cond: Cond, name: str) -> dict[str, Tensor]:
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {name: cond}
    return {k: v for key, inner in cond.items() for k, v in _flat(inner, f"{name}/{key}").items()}


@torch.no_grad()
def build_pairs(
    teacher: Denoiser,
    batches: Batches,
    generator: Generator,
    *,
    solver: str = "dpm++",
    steps: int = 8,
    count: int | None = None,
    seconds: float | None = None,
    told: Told | None = None,
) -> Pairs:
    """Pairs for about `count` samples or `seconds`, whichever ends first; at least one batch. The teacher comes guided.

    batches(step, generator) -> {"cond", "shape"}. told("teacher pairs", share) after each batch. Raises ValueError when
    there is no budget at all.
    """
    if count is None and seconds is None:
        raise ValueError("build_pairs needs a budget: count or seconds")
    rows, start, n, done = [], time.monotonic(), 0, 0.0
    while not rows or done < 1:
        batch = batches(len(rows), generator)
        z = randn(batch["shape"], generator, batch.get("device"))
        rows.append((z, batch["cond"], solve(teacher, z, batch["cond"], solver=solver, steps=steps)))
        n += len(z)
        done = n / count if count is not None else 0.0
        if seconds is not None:
            done = max(done, (time.monotonic() - start) / max(seconds, 1e-9))
        if told is not None:
            told("teacher pairs", min(1.0, done))
    z, conds, x0 = zip(*rows)
    return Pairs(torch.cat(z), map_cond(lambda *c: torch.cat(c), *conds), torch.cat(x0), len(z[0]))
