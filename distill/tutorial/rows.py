"""The rows that a model's figures stand among: real pictures, encoded ones, its teacher, the law it is drawn to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..denoiser import Denoiser, autoguided, guided
from ..sample import solve
from ..schedule import randn
from . import shapes
from .metrics import COLUMNS, Generate, Judge, evaluate_seeds, spread


def real_pictures(prompts: list[str], generator: torch.Generator) -> Tensor:
    """Renders of the prompts, what they leave open drawn at random: the best generator there can be."""
    rows = shapes.sample_attributes(len(prompts), generator)
    for row, text in zip(rows, prompts):
        for name, value in shapes.parse(text).items():
            row[shapes.NAMES.index(name)] = shapes.ATTRIBUTES[name].index(value)
    return shapes.render(rows, shapes.sample_style(len(rows), generator))


def encoded(model: Backbone) -> Generate:
    """Real pictures after a model's autoencoder: the best that a generator of its latents can be."""

    @torch.no_grad()
    def generate(prompts: list[str], generator: torch.Generator) -> Tensor:
        images = real_pictures(prompts, generator).to(model.device)
        return torch.cat([model.decode(model.to_latents(x)) for x in images.split(64)]).cpu()

    return generate


def under_law(teacher: Backbone, weak: Denoiser | None, law: dict[str, float], steps: int = 20) -> Generate:
    """Pictures of the law itself, through the solver: the fair row to hold a student against.

    law: guidance, guidance_until, autoguidance. steps: 20 and 50 gave the same Frechet distance.
    """
    drawn_to = guided(teacher.denoiser, law["guidance"], teacher.null, law["guidance_until"])
    denoiser = autoguided(drawn_to, law["autoguidance"], weak)

    @torch.no_grad()
    def generate(prompts: list[str], generator: torch.Generator) -> Tensor:
        images = []
        for i in range(0, len(prompts), 128):
            some = prompts[i : i + 128]
            z = randn(teacher.shape(len(some)), generator, teacher.device)
            images.append(teacher.decode(solve(denoiser, z, teacher.encode(some), steps=steps)))
        return torch.cat(images).cpu()

    return generate


def floors(model: Backbone, judge: Judge, **how: Any) -> dict[str, dict]:
    """The two rows that no generator of this model's latents can pass. how: n, seeds, first, as for evaluate_seeds."""
    return {
        "real pictures, encoded": evaluate_seeds(encoded(model), judge, **how),
        "real pictures": evaluate_seeds(real_pictures, judge, **how),
    }


def table(rows: dict[str, dict]) -> str:
    """Markdown, aligned: a row per generator, as means over seeds with half the distance between the extremes."""

    def cell(row: dict, field: str) -> str:
        if field not in row:
            return ""
        around = spread(row, field)
        return f"{row[field]:.3g}" + (f" ±{around:.2g}" if around else "")

    some = next(iter(rows.values()))
    count = len(some.get("seeds", [0]))
    head = [f"n = {some['n']}" + (f", {count} seeds" if count > 1 else ""), *COLUMNS]
    cells = [[name, *(cell(row, field) for field in COLUMNS.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(line, widths)) for line in (head, *cells)]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def print_table(rows: dict[str, dict]) -> None:
    print("\n" + table(rows))
