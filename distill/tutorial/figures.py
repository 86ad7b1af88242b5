"""Plain functions of readings and pictures, from which `metrics` makes its figures."""

from __future__ import annotations

import torch
from torch import Tensor

from . import shapes
from .judge import Reading


def all_right(read: Tensor, asked: Tensor, stated: Tensor | None = None) -> Tensor:
    """Whether every stated attribute is as asked. read, asked (B, 5) int, stated (B, 5) bool -> (B,) bool."""
    right = read == asked
    return (right if stated is None else right | ~stated).all(1)


def style_spread(style: Tensor, counts: Tensor, groups: int) -> Tensor:
    """Standard deviation of each style number among pictures of one prompt, (10,).

    style (groups * k, 10), a group's rows together; a row that does not count, (groups * k,) bool, stands at the mean
    of its group: mush must not pass for variety.
    """
    style, counts = style.view(groups, -1, style.shape[-1]), counts.view(groups, -1, 1).to(style)
    mean = (style * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    return ((style - mean) * counts).square().mean((0, 1)).sqrt()


def entropy(attributes: Tensor, stated: Tensor, groups: int, counts: Tensor | None = None) -> float:
    """Mean entropy in nats of the attributes a prompt leaves open, within groups of pictures of one prompt.

    attributes (groups * k, 5) as read, stated (groups, 5), counts (groups * k,) bool: which rows to look at.
    """
    total, count = 0.0, 0
    counts = torch.ones(len(attributes), dtype=torch.bool) if counts is None else counts
    for all_rows, some, said in zip(attributes.view(groups, -1, len(shapes.NAMES)), counts.view(groups, -1), stated):
        rows = all_rows[some]
        for i, values in enumerate(shapes.ATTRIBUTES.values()):
            if not said[i]:
                p = torch.bincount(rows[:, i], minlength=len(values)).double() / max(len(rows), 1)
                total, count = total - torch.special.xlogy(p, p).sum().item(), count + 1
    return total / max(count, 1)


def distance_to_clean(images: Tensor, reading: Reading) -> Tensor:
    """Root mean square distance of each picture to a clean render of what the judge read in it, (B,)."""
    clean = shapes.render(reading.attributes, reading.style.clamp(-1.2, 1.2))
    return (images - clean).square().mean((1, 2, 3)).sqrt()
