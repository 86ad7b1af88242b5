"""`distill bench`: how long a model takes, part by part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..bench import Chain


@dataclass(frozen=True)
class Bench:
    """Measure latency of one picture after the other (p50, p90, p99) and throughput of batches, as MLPerf does.

    The text encoder, the network with all its steps, and the autoencoder are timed apart.
    """

    model: tyro.conf.Positional[str] = "student"
    """A OneStep file, a LoRA of one, a folder of diffusers', or the bundled student or teacher."""
    base: str | None = None
    """The model that a LoRA adds to. Default: the bundled one of that name."""
    queries: int = 100
    """Pictures made one at a time; the more, the narrower the range of a percentile. p99 is bounded from 368 on."""
    batches: int = 10
    batch: int = 8
    """Pictures in a batch."""
    warmup: int = 5
    """Queries, and batches, before the first that counts."""
    steps: int | None = None
    """Default: what the file recommends."""
    size: int | None = None
    """Pixels of a side. Default: what the model was trained at."""
    threads: int | None = None
    """Of the CPU. Default: torch's."""
    seed: int = 0
    out: Path = Path("bench.json")
    """Every time that was taken, and where; overwritten where it exists."""
    plot: Path | None = None
    """Also draw the queries' times into this PNG."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""


def run(o: Bench) -> None:
    """Measure, print the table, write JSON. Raises CheckpointError for a file, ValueError for what cannot be."""
    from ..checks import SEEDS, within
    from .console import bars, open_model, writable

    within(o, queries=(1, inf), batches=(1, inf), batch=(1, inf), warmup=(0, inf), steps=(1, inf), seed=SEEDS)
    within(o, size=(8, inf), threads=(1, os.cpu_count() or 1))  # of very many OpenMP dies without a word
    writable(o.out, ending=".json")
    if o.plot:
        writable(o.plot, ending=".png")
    import torch

    from ..atomic import replace, write_beside
    from ..bench import measure, plot, table

    if o.threads:
        torch.set_num_threads(o.threads)
    model = open_model(o.model, o.device, o.base)
    counts = {"queries": o.queries, "batches": o.batches, "batch": o.batch, "warmup": o.warmup, "seed": o.seed}
    about = {"steps": o.steps or model.meta.steps, "pixels": model.shape(1, o.size)[-1] * model.meta.latent["factor"]}
    about["numbers"] = str(next(model.net.parameters()).dtype).removeprefix("torch.")
    with bars() as told, torch.no_grad():
        report = measure(
            model.name,
            chain(model, o.steps),
            query(model, o.size),
            **counts,
            device=model.device,
            about=about,
            told=told,
        )
    print(table(report))
    o.out.parent.mkdir(parents=True, exist_ok=True)
    replace(o.out, report.to_json().encode())
    if o.plot:
        o.plot.parent.mkdir(parents=True, exist_ok=True)
        write_beside(o.plot, lambda temporary: plot(report).save(temporary, "PNG"))
    print(f"\n{o.out}" + (f", {o.plot}" if o.plot else ""))


def chain(model: Backbone, steps: int | None = None) -> Chain:
    """A model's parts, as `bench.measure` times them."""
    return {
        "text encoder": lambda given: (given[0], model.encode(given[1])),
        "network": lambda given: model.latents(*given, steps=steps),
        "autoencoder": model.decode,
    }


def query(model: Backbone, size: int | None = None):
    """(number, pictures) -> (noise, prompts): of its own world for a tutorial model, else general ones."""
    import torch

    from ..quantize.prompts import GENERAL
    from ..schedule import randn
    from ..tutorial.prompts import speaks
    from ..tutorial.shapes import sample_prompts

    world = speaks(model)

    def make(number: int, pictures: int) -> tuple[Any, list[str]]:
        g = torch.Generator().manual_seed(number % 2**64)
        prompts = [GENERAL[(number + i) % len(GENERAL)] for i in range(pictures)]
        return randn(model.shape(pictures, size), g, model.device), sample_prompts(pictures, g) if world else prompts

    return make
