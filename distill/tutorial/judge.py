"""Trains the judge of `distill.tutorial.metrics` on fresh renders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import shapes
from .fit import fit
from .metrics import Judge


def train(minutes: float = 8, seed: int = 0, batch: int = 64) -> Judge:
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

    return fit(judge, loss, minutes, lr=2e-3, seed=seed, name="judge")


def accuracy(judge: Judge, n: int = 4096, seed: int = 99) -> dict[str, float]:
    """Accuracy on n fresh renders, per attribute and with all of them right."""
    generator = torch.Generator().manual_seed(seed)
    attributes = shapes.sample_attributes(n, generator, held_out=None)
    right = judge.read(shapes.render(attributes, shapes.sample_style(n, generator))).attributes == attributes
    each = {name: right[:, i].float().mean().item() for i, name in enumerate(shapes.NAMES)}
    return each | {"all": right.all(1).float().mean().item()}
