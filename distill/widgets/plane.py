"""Pictures of the plane: points of a student or a teacher, and fields of arrows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from torch import Tensor

from .style import COLOURS

LIMIT = 3.2  # half a side of what is shown: the ring of radius 2 with room around


def plane(ax: Axes, title: str = "", limit: float = LIMIT) -> Axes:
    """A square window on the plane."""
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="$x_1$", ylabel="$x_2$", title=title, aspect="equal")
    return ax


def points(ax: Axes, x: Tensor, role: str = "data", label: str | None = None, most: int = 1500) -> None:
    """Points (N, 2), the first `most` of them; role: a name in COLOURS."""
    x = x.detach()[:most].cpu()
    ax.scatter(x[:, 0], x[:, 1], s=5, alpha=0.45, linewidths=0, color=COLOURS[role], label=label)
    if label:
        ax.legend(frameon=False, fontsize=9, loc="upper right", markerscale=2)


@torch.no_grad()
def field(
    ax: Axes,
    arrows: Callable[[Tensor], Tensor],
    role: str = "teacher",
    n: int = 15,
    limit: float = LIMIT,
    label: str | None = None,
    scale: float | None = None,
) -> Tensor:
    """Arrows (N, 2) of a function of points (N, 2) on an n x n grid; those arrows.

    scale: length of arrow that is drawn one grid cell long; default the largest of them.
    """
    line = torch.linspace(-limit, limit, n)
    grid = torch.cartesian_prod(line, line)
    found = arrows(grid)
    largest = found.norm(dim=1).max().item() if scale is None else scale
    drawn = found * (2 * limit / (n - 1)) / max(largest, 1e-12)
    options = {"angles": "xy", "scale_units": "xy", "scale": 1.0, "width": 0.005}
    ax.quiver(grid[:, 0], grid[:, 1], drawn[:, 0], drawn[:, 1], color=COLOURS[role], label=label, **options)
    if label:
        ax.legend(frameon=False, fontsize=9, loc="upper right")
    return found
