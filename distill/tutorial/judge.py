"""The judge: a small convolutional net that reads every attribute and the style off a picture; and its training."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from . import shapes
from .fit import fit

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


def train(minutes: float = 8, seed: int = 0, work: Path | None = None, batch: int = 64) -> Judge:
    torch.manual_seed(seed)  # the initial weights
    judge = Judge()

    def loss(generator: torch.Generator) -> Tensor:
        attributes = shapes.sample_attributes(batch, generator, held_out=None)
        style = shapes.sample_style(batch, generator)
        images = shapes.render(attributes, style)
        noise = torch.rand(batch, 1, 1, 1, generator=generator).sub(0.5).clamp(min=0) * 0.2  # half see a little noise
        logits, guess, _ = judge(images + noise * torch.randn(images.shape, generator=generator))
        reading = sum(F.cross_entropy(logit, a) for logit, a in zip(logits, attributes.T))
        return reading + F.mse_loss(guess, style)

    return fit(judge, loss, minutes, 2e-3, seed=seed, name="judge", work=work)[0.999]


def accuracy(judge: Judge, n: int = 4096, seed: int = 99) -> dict[str, float]:
    """Accuracy on n fresh renders, per attribute and with all of them right."""
    generator = torch.Generator().manual_seed(seed)
    attributes = shapes.sample_attributes(n, generator, held_out=None)
    right = judge.read(shapes.render(attributes, shapes.sample_style(n, generator))).attributes == attributes
    each = {name: right[:, i].float().mean().item() for i, name in enumerate(shapes.NAMES)}
    return each | {"all": right.all(1).float().mean().item()}
