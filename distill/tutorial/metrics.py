"""What a generator of tutorial pictures is worth, in figures that are hard to fool together.

Accuracy forgives a generator that always draws the same ring; the Frechet distance forgives blur; and both look through
the eyes of a judge, who must answer even where there is nothing to see. So the renderer is the second witness (see
`nearest`): what is left over beside the nearest render says how well a picture is drawn, and a picture that no render
is near to does not count as right. Every figure stands against real renders, and against real renders that went
through the generator's own autoencoder, beyond which it cannot get.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..evaluation.figures import frechet
from . import shapes
from .figures import all_right, distance_to_clean, entropy, style_spread
from .judge import Judge, Reading
from .nearest import Nearest, nearest_render

__all__ = ["Judge", "Report", "evaluate", "evaluate_seeds", "frechet"]


@dataclass
class Report:
    """Every figure with the number of samples behind it; `*_ratio` are against real renders (1 is as real)."""

    n: int
    """Pictures, one each for n random prompts that state everything and are not held out."""
    accuracy: float
    """Share of the n with every attribute right, in a picture that a render is near to."""
    accuracy_n: int
    held_out_accuracy: float
    """The same on combinations never trained on."""
    held_out_n: int
    frechet: float
    """Frechet distance on the judge's features between the n and renders of the same prompts."""
    frechet_floor: float
    """The same between two sets of renders of those prompts: what a perfect generator would get."""
    style_ratio: float
    """Spread of what a full prompt leaves unsaid (place, size, turn, tints), as the nearest render has it, against
    renders'; the mean over the ten numbers of at most 1 each, so that too much of one cannot make up for another."""
    style_n: int
    entropy_ratio: float
    """Entropy of attributes that short prompts leave open, against renders'."""
    entropy_n: int
    short_accuracy: float
    """Share of those short-prompt pictures that show what the prompt states."""
    short_clean: float
    """Share of them as close to a clean render as 95 % of renders are: mush, where the prompt leaves much open."""
    residual: float
    """Median over the n of the root mean square distance to the nearest render, pictures being in [-1, 1] (real: 0)."""
    short_residual: float
    """The same of the short-prompt pictures."""
    clean: float
    """Share of the n as close to a clean render of what is read in them as 95 % of renders are (real: 0.95)."""

    def to_dict(self) -> dict[str, float]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


COLUMNS = {
    "right": "accuracy", "held out": "held_out_accuracy", "Frechet": "frechet", "style": "style_ratio",
    "entropy": "entropy_ratio", "residual": "residual", "clean": "clean", "short": "short_accuracy",
    "short clean": "short_clean",
}  # fmt: skip
"""What tables show: heading and field of Report."""

Generate = Callable[[list[str], torch.Generator], Tensor]
"""(prompts, generator) -> pictures (B, 3, 64, 64) in [-1, 1]."""

GROUPS, PER_GROUP = 32, 16  # prompts and pictures a prompt, for style and for entropy each


class Seen(NamedTuple):
    """Some pictures, what the judge reads in them and what the renderer says to that."""

    images: Tensor
    reading: Reading
    nearest: Nearest

    def right(self, asked: Tensor, stated: Tensor | None = None) -> float:
        """Share of pictures that show what was asked."""
        return (all_right(self.reading.attributes, asked, stated) & ~self.nearest.none).float().mean().item()

    def clean(self, limit: float) -> float:
        """Share of pictures no farther than that from a clean render of the reading."""
        return (distance_to_clean(self.images, self.reading) <= limit).float().mean().item()

    @property
    def residual(self) -> float:
        return self.nearest.residual.median().item()


def look(judge: Judge, images: Tensor) -> Seen:
    """Read pictures (B, 3, 64, 64) and look for the render nearest to each."""
    reading = judge.read(images)
    return Seen(images, reading, nearest_render(images, reading.attributes, reading.style))


@torch.no_grad()
def evaluate(generate: Generate, judge: Judge, n: int = 1024, seed: int = 1234) -> Report:
    """Measure a generator: n full prompts, n/4 held-out ones, and 32 prompts x 16 pictures for style and for entropy.

    The same n and seed give the same prompts and the same real pictures, so that reports compare.
    """
    g = torch.Generator().manual_seed(seed)

    def real(attributes: Tensor) -> Tensor:
        return shapes.render(attributes, shapes.sample_style(len(attributes), g))

    def made(attributes: Tensor, stated: Tensor | None = None) -> Seen:
        some = [None] * len(attributes) if stated is None else stated
        return look(judge, generate([shapes.prompt(a, s) for a, s in zip(attributes, some)], g))

    asked = shapes.sample_attributes(n, g)
    true, other = real(asked), real(asked)
    reading = judge.read(true)
    limit = distance_to_clean(true, reading).quantile(0.95).item()
    full = made(asked)
    unseen = shapes.sample_attributes(max(n // 4, 16), g, held_out=True)
    held_out = made(unseen).right(unseen)

    rows = shapes.sample_attributes(GROUPS, g)
    repeated = rows.repeat_interleave(PER_GROUP, 0)
    of_real, of_made = (
        style_spread(x.nearest.style, ~x.nearest.none, GROUPS) for x in (look(judge, real(repeated)), made(repeated))
    )

    stated = torch.zeros(GROUPS, len(shapes.NAMES), dtype=torch.bool)
    stated[torch.arange(GROUPS), torch.arange(GROUPS) % len(shapes.NAMES)] = True  # short prompts: one attribute each
    open_real = entropy(judge.read(_completions(rows, stated, g)).attributes, stated, GROUPS)
    said = stated.repeat_interleave(PER_GROUP, 0)
    brief = made(repeated, said)
    return Report(
        n=n,
        accuracy=full.right(asked),
        accuracy_n=n,
        held_out_accuracy=held_out,
        held_out_n=len(unseen),
        frechet=frechet(full.reading.features, reading.features),
        frechet_floor=frechet(judge.read(other).features, reading.features),
        style_ratio=(of_made / of_real).clamp(max=1).mean().item(),
        style_n=GROUPS * PER_GROUP,
        entropy_ratio=entropy(brief.reading.attributes, stated, GROUPS, ~brief.nearest.none) / open_real,
        entropy_n=GROUPS * PER_GROUP,
        short_accuracy=brief.right(repeated, said),
        short_clean=brief.clean(limit),
        residual=full.residual,
        short_residual=brief.residual,
        clean=full.clean(limit),
    )


def pictures(n: int) -> int:
    """How many pictures `evaluate` asks a generator for."""
    return n + max(n // 4, 16) + 2 * GROUPS * PER_GROUP


def evaluate_seeds(generate: Generate, judge: Judge, n: int = 1024, seeds: int = 3, first: int = 1234) -> dict:
    """`evaluate` at `seeds` seeds from `first` on: a report's fields as means, and under "each" the values they are of.

    One seed carries no claim: the Frechet distance of one and the same student moves by a fifth from seed to seed.
    """
    reports = [evaluate(generate, judge, n, first + i).to_dict() for i in range(seeds)]
    each = {f.name: [r[f.name] for r in reports] for f in fields(Report)}
    mean = {k: v[0] if k.endswith("n") and isinstance(v[0], int) else round(sum(v) / seeds, 4) for k, v in each.items()}
    return mean | {"seeds": list(range(first, first + seeds)), "each": {k: each[k] for k in COLUMNS.values()}}


def known(report: dict) -> dict:
    """A report for a file's card: without the figures that are not numbers, as where nothing could be read."""
    bad = {k for k, v in report.items() if isinstance(v, float) and not math.isfinite(v)}
    each = {k: v for k, v in report.get("each", {}).items() if all(map(math.isfinite, v))}
    return {k: v for k, v in report.items() if k not in bad} | ({"each": each} if "each" in report else {})


def spread(report: dict, field: str) -> float:
    """Half the distance between the largest and the smallest value of a field over seeds; 0 for one seed."""
    values = report.get("each", {}).get(field, [0.0])
    return (max(values) - min(values)) / 2


def _completions(attributes: Tensor, stated: Tensor, generator: torch.Generator) -> Tensor:
    """Real pictures of short prompts: training combinations that agree with what is stated, PER_GROUP a prompt."""
    pool = shapes.sample_attributes(20000, generator)
    rows = []
    for a, s in zip(attributes, stated):
        fits = pool[((pool == a) | ~s).all(1)]
        rows.append(fits[torch.randint(len(fits), (PER_GROUP,), generator=generator)])
    rows = torch.cat(rows)
    return shapes.render(rows, shapes.sample_style(len(rows), generator))
