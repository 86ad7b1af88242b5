"""The net whose features the autoencoder is trained on: of another build, seed and width than the judge's.

An autoencoder that is trained on a judge's features learns to please that judge. This one reads the same things off a
picture by other means (strided patches, residual blocks, one trunk for attributes and style), so that a judge's figures
stay a second opinion.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import shapes
from .fit import fit


class Residual(nn.Module):
    """x + conv(gelu(norm(conv(gelu(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.n = nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.n(self.a(F.gelu(x)))))


class Features(nn.Module):
    """maps(x): features of (B, 3, 64, 64) pictures at 32x32, 16x16 and 8x8."""

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        a, b, c = widths
        stems = (nn.Conv2d(3, a, 5, 2, 2), nn.Conv2d(a, b, 2, 2), nn.Conv2d(b, c, 2, 2))
        self.stages = nn.ModuleList(nn.Sequential(stem, Residual(w)) for stem, w in zip(stems, widths))
        self.trunk = nn.Sequential(nn.GELU(), nn.Conv2d(c, 20, 1), nn.Flatten(), nn.Linear(20 * 64, 192), nn.GELU())
        self.heads = nn.ModuleList(nn.Linear(192, len(v)) for v in shapes.ATTRIBUTES.values())
        self.style = nn.Linear(192, len(shapes.STYLE))

    def maps(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits per attribute, and style (B, 10)."""
        h = self.trunk(self.maps(x)[-1])
        return [head(h) for head in self.heads], self.style(h)


def train(minutes: float, seed: int = 7, work: Path | None = None, batch: int = 48) -> Features:
    """Six minutes of one core read attributes as well as the judge does, and style to a fifth of its spread."""
    torch.manual_seed(77)  # the initial weights
    net = Features()

    def loss(generator: torch.Generator) -> Tensor:
        attributes = shapes.sample_attributes(batch, generator, held_out=None)
        style = shapes.sample_style(batch, generator)
        images = shapes.render(attributes, style)
        noise = torch.rand(batch, 1, 1, 1, generator=generator).sub(0.5).clamp(min=0) * 0.3  # half see some noise
        logits, guess = net(images + noise * torch.randn(images.shape, generator=generator))
        reading = sum(F.cross_entropy(logit, a) for logit, a in zip(logits, attributes.T))
        return reading + 3 * F.mse_loss(guess, style)

    how = {"averages": (0.998,), "fall": 0.4, "work": work}
    return fit(net, loss, minutes, 2e-3, seed=seed, name="features", **how)[0.998].requires_grad_(False)
