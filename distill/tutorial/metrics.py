"""What a generator of tutorial pictures is worth: a judge that reads pictures, and figures made from its readings.

No figure stands alone. Accuracy forgives a generator that always draws the same ring; the Frechet distance forgives
blur; so diversity, entropy, sharpness and cleanness stand beside them, each against real renders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from . import shapes

FEATURES = 64


class Reading(NamedTuple):
    """What the judge sees in B pictures."""

    attributes: Tensor  # (B, 5) int64, columns as shapes.NAMES
    style: Tensor  # (B, 10), columns as shapes.STYLE
    features: Tensor  # (B, 64), for distances between sets of pictures


class Judge(nn.Module):
    """A small convolutional net that reads all attributes and the style off a 64x64 picture."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.SiLU(), nn.Conv2d(o, o, 3, 1, 1),
                                 nn.GroupNorm(8, o), nn.SiLU())  # fmt: skip

        self.body = nn.Sequential(block(3, 32), block(32, 64), block(64, 96), nn.Conv2d(96, 24, 1), nn.Flatten())
        self.features = nn.Sequential(nn.Linear(24 * 64, 256), nn.SiLU(), nn.Linear(256, FEATURES))
        self.heads = nn.ModuleList(nn.Linear(FEATURES, len(v)) for v in shapes.ATTRIBUTES.values())
        self.style = nn.Sequential(nn.Linear(24 * 64, 128), nn.SiLU(), nn.Linear(128, len(shapes.STYLE)))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> logits per attribute, style (B, 10), features (B, 64)."""
        h = self.body(images)
        f = self.features(h)
        return [head(F.silu(f)) for head in self.heads], self.style(h), f

    @torch.no_grad()
    def read(self, images: Tensor, batch: int = 128) -> Reading:
        """Read pictures (B, 3, 64, 64) in [-1, 1]."""
        parts = [self(x) for x in images.float().split(batch)]
        attributes = torch.cat([torch.stack([logit.argmax(1) for logit in p[0]], 1) for p in parts])
        return Reading(attributes, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]))

    @classmethod
    def load(cls, path: str | Path | None = None) -> Judge:
        """The bundled judge, or one from a safetensors file."""
        path = Path(path or Path(__file__).parent / "assets" / "judge.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no judge there. Make it with `python -m distill.tutorial.build judge`.")
        judge = cls().eval().requires_grad_(False)
        judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        return judge

    @staticmethod
    def card(path: str | Path | None = None) -> dict[str, str]:
        """The metadata stored beside the judge's weights: its accuracy, and what it was trained on."""
        with safe_open(path or Path(__file__).parent / "assets" / "judge.safetensors", "pt") as file:
            return dict(file.metadata())


# ---------------------------------------------------------------------------------------------------------- the figures
def all_right(read: Tensor, asked: Tensor, stated: Tensor | None = None) -> Tensor:
    """Whether every stated attribute is as asked. read, asked (B, 5) int, stated (B, 5) bool -> (B,) bool."""
    right = read == asked
    return (right if stated is None else right | ~stated).all(1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features a (N, D) and b (M, D) (Heusel et al. 2017, eq. 6).

    The trace of the root of the product is taken from the eigenvalues of a symmetric matrix similar to it. The value
    falls with the number of samples: compare only equal N, and give the distance between two real sets beside it.
    """
    a, b = a.double(), b.double()
    ca, cb = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross).item()


def spread(features: Tensor, groups: int) -> float:
    """Mean distance between pictures of the same prompt. features (groups * k, D), a group's rows together."""
    f = features.view(groups, -1, features.shape[-1])
    k = f.shape[1]
    return (torch.cdist(f, f).sum((1, 2)) / (k * (k - 1))).mean().item()


def entropy(attributes: Tensor, stated: Tensor, groups: int) -> float:
    """Mean entropy in nats of the attributes a prompt leaves open, within groups of pictures of one prompt.

    attributes (groups * k, 5) as read, stated (groups, 5).
    """
    total, count = 0.0, 0
    for rows, said in zip(attributes.view(groups, -1, len(shapes.NAMES)), stated):
        for i, values in enumerate(shapes.ATTRIBUTES.values()):
            if not said[i]:
                p = torch.bincount(rows[:, i], minlength=len(values)).double() / len(rows)
                total, count = total - torch.special.xlogy(p, p).sum().item(), count + 1
    return total / max(count, 1)


def sharpness(images: Tensor) -> float:
    """Mean absolute Laplacian: falls with blur, rises with texture noise. (B, 3, H, W)."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return F.conv2d(images, kernel, groups=3).abs().mean().item()


def distance_to_clean(images: Tensor, reading: Reading) -> Tensor:
    """Root mean square distance of each picture to a clean render of what the judge read in it, (B,)."""
    clean = shapes.render(reading.attributes, reading.style.clamp(-1.2, 1.2))
    return (images - clean).square().mean((1, 2, 3)).sqrt()


# ----------------------------------------------------------------------------------------------------------- evaluation
@dataclass
class Report:
    """Every figure with the number of samples behind it; `*_ratio` are against real renders (1 is as real)."""

    n: int
    """Pictures, one each for n random prompts that state everything and are not held out."""
    accuracy: float
    """Share of the n with every attribute right."""
    accuracy_n: int
    held_out_accuracy: float
    """The same on combinations never trained on."""
    held_out_n: int
    frechet: float
    """Frechet distance on the judge's features between the n and renders of the same prompts."""
    frechet_floor: float
    """The same between two sets of renders of those prompts: what a perfect generator would get."""
    diversity_ratio: float
    """Spread among pictures of one full prompt, against renders'."""
    diversity_n: int
    entropy_ratio: float
    """Entropy of attributes that short prompts leave open, against renders'."""
    entropy_n: int
    short_accuracy: float
    """Share of those short-prompt pictures that show what the prompt states."""
    short_clean: float
    """Share of them as close to a clean render as 95 % of renders are: mush, where the prompt leaves much open."""
    sharpness_ratio: float
    """Mean absolute Laplacian of the n against renders'; below 1 is blur, above 1 texture noise."""
    clean: float
    """Share of the n as close to a clean render of what is read in them as 95 % of renders are (real: 0.95)."""

    def to_dict(self) -> dict[str, float]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


COLUMNS = {
    "right": "accuracy", "held out": "held_out_accuracy", "Frechet": "frechet", "diversity": "diversity_ratio",
    "entropy": "entropy_ratio", "short": "short_accuracy", "short clean": "short_clean", "sharp": "sharpness_ratio",
    "clean": "clean",
}  # fmt: skip
"""What tables show: heading and field of Report."""

Generate = Callable[[list[str], torch.Generator], Tensor]
"""(prompts, generator) -> pictures (B, 3, 64, 64) in [-1, 1]."""

GROUPS, PER_GROUP = 32, 16  # prompts and pictures a prompt, for diversity and for entropy each


@torch.no_grad()
def evaluate(generate: Generate, judge: Judge, n: int = 1024, seed: int = 1234) -> Report:
    """Measure a generator: n full prompts, n/4 held-out ones, and 32 prompts x 16 pictures for diversity and entropy.

    The same n and seed give the same prompts and the same real pictures, so that reports compare.
    """
    g = torch.Generator().manual_seed(seed)

    def renders(attributes: Tensor) -> tuple[Tensor, Reading]:
        images = shapes.render(attributes, shapes.sample_style(len(attributes), g))
        return images, judge.read(images)

    asked = shapes.sample_attributes(n, g)
    real, real_reading = renders(asked)
    other_features = renders(asked)[1].features
    made = generate([shapes.prompt(a) for a in asked], g)
    reading = judge.read(made)

    unseen = shapes.sample_attributes(max(n // 4, 16), g, held_out=True)
    unseen_read = judge.read(generate([shapes.prompt(a) for a in unseen], g)).attributes

    def repeated(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(PER_GROUP, 0)

    full = shapes.sample_attributes(GROUPS, g)
    full_real = spread(renders(repeated(full))[1].features, GROUPS)
    full_made = spread(judge.read(generate([shapes.prompt(a) for a in repeated(full)], g)).features, GROUPS)

    stated = torch.zeros(GROUPS, len(shapes.NAMES), dtype=torch.bool)
    stated[torch.arange(GROUPS), torch.arange(GROUPS) % len(shapes.NAMES)] = True  # short prompts: one attribute each
    short = [shapes.prompt(a, s) for a, s in zip(repeated(full), repeated(stated))]
    open_real = entropy(judge.read(_completions(full, stated, g)).attributes, stated, GROUPS)
    brief = generate(short, g)
    brief_reading = judge.read(brief)
    stated_right = all_right(brief_reading.attributes, repeated(full), repeated(stated))

    limit = distance_to_clean(real, real_reading).quantile(0.95)
    return Report(
        n=n,
        accuracy=all_right(reading.attributes, asked).float().mean().item(),
        accuracy_n=n,
        held_out_accuracy=all_right(unseen_read, unseen).float().mean().item(),
        held_out_n=len(unseen),
        frechet=frechet(reading.features, real_reading.features),
        frechet_floor=frechet(other_features, real_reading.features),
        diversity_ratio=full_made / full_real,
        diversity_n=GROUPS * PER_GROUP,
        entropy_ratio=entropy(brief_reading.attributes, stated, GROUPS) / open_real,
        entropy_n=GROUPS * PER_GROUP,
        short_accuracy=stated_right.float().mean().item(),
        short_clean=(distance_to_clean(brief, brief_reading) <= limit).float().mean().item(),
        sharpness_ratio=sharpness(made) / sharpness(real),
        clean=(distance_to_clean(made, reading) <= limit).float().mean().item(),
    )


def _completions(attributes: Tensor, stated: Tensor, generator: torch.Generator) -> Tensor:
    """Real pictures of short prompts: training combinations that agree with what is stated, PER_GROUP a prompt."""
    pool = shapes.sample_attributes(20000, generator)
    rows = []
    for a, s in zip(attributes, stated):
        fits = pool[((pool == a) | ~s).all(1)]
        rows.append(fits[torch.randint(len(fits), (PER_GROUP,), generator=generator)])
    rows = torch.cat(rows)
    return shapes.render(rows, shapes.sample_style(len(rows), generator))


def print_table(rows: dict[str, dict]) -> None:
    some = next(iter(rows.values()))
    print(f"\n{'n = ' + str(some['n']):<20}" + "".join(f"{c:>11}" for c in COLUMNS))
    for name, row in rows.items():
        print(f"{name:<20}" + "".join(f"{row.get(key, math.nan):>11.3f}" for key in COLUMNS.values()))
    real = {k: 1.0 for k in COLUMNS.values()} | {"frechet": some["frechet_floor"], "clean": 0.95, "short_clean": 0.95}
    print(f"{'real pictures':<20}" + "".join(f"{real[key]:>11.3f}" for key in COLUMNS.values()))
