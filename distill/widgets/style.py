"""One look for all plots: a colour for each part of the story, safe for colour-blind eyes, and named axes.

Nothing of matplotlib's global state is touched, so that a training thread may draw while a cell does.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..backbones.drawing import to_pil

COLOURS = {
    "teacher": "#0072B2",
    "student": "#D55E00",
    "coach": "#009E73",
    "data": "#8A8A8A",
    "first": "#0072B2",
    "second": "#E69F00",
    "third": "#009E73",
    "fourth": "#CC79A7",
    "fifth": "#56B4E9",
    "sixth": "#D55E00",
}
"""By role and, for curves without one, by number: Okabe and Ito's palette (2008)."""
CYCLE = [COLOURS[n] for n in ("first", "second", "third", "fourth", "fifth", "sixth")]
DPI = 84


def axes(columns: int = 1, rows: int = 1, width: float = 3.6, height: float = 3.0) -> tuple[Figure, list[Axes] | Axes]:
    """A figure and its axes, row by row (one alone comes as itself); width and height of each in inches."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained", dpi=DPI)
    found = [dress(ax) for ax in figure.subplots(rows, columns, squeeze=False).flat]
    return figure, found[0] if len(found) == 1 else found


def dress(ax: Axes) -> Axes:
    """The course's look: two spines, a pale grid behind, our colours."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#E6E6E6", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.set_prop_cycle(color=CYCLE)
    ax.tick_params(labelsize=9)
    return ax


def curves(
    ax: Axes, x: Sequence[float], series: Mapping[str, Sequence[float]], across: str, up: str, title: str = ""
) -> Axes:
    """Curves by name over x, in their role's colour where they have one; across and up name the axes."""
    for name, y in series.items():
        ax.plot(x[: len(y)], y, label=name, linewidth=1.8, **({"color": COLOURS[name]} if name in COLOURS else {}))
    ax.set(xlabel=across, ylabel=up, title=title)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax


def sheet(rows: Mapping[str, Tensor], titles: Sequence[str] = (), zoom: float = 1.0) -> Figure:
    """Pictures (B, 3, H, W) in [-1, 1], a labelled row for each entry; titles stand above the columns."""
    n, words, head = max(len(images) for images in rows.values()), 0.2 + 0.085 * max(map(len, rows)), 0.3 * bool(titles)
    width, height = words + n * zoom, head + len(rows) * zoom
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.subplots_adjust(words / width, 0, 1, 1 - head / height, hspace=0.03)
    for ax, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows.items()):
        strip = np.concatenate([*to_array(images)], axis=1)  # H, B * W, 3
        ax.imshow(strip, interpolation="nearest")
        ax.set_yticks([strip.shape[0] / 2], [label], fontsize=9)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        if titles and ax.get_subplotspec().is_first_row():
            side = images.shape[-1]
            ax.xaxis.tick_top()
            ax.set_xticks([side * (i + 0.5) for i in range(len(titles))], titles, fontsize=8)
    return figure


def to_array(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) of bytes."""
    return np.stack([np.asarray(picture) for picture in to_pil(images.detach())])


def png(picture: object) -> bytes:
    """A figure, a PIL image, or one picture (3, H, W) in [-1, 1], as a PNG. Raises TypeError for anything else."""
    from PIL import Image

    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png")
    elif isinstance(picture, Tensor):
        pixels = to_pil(picture[None].detach())[0]
        pixels.resize([4 * s for s in pixels.size], Image.Resampling.NEAREST).save(buffer, format="png")
    elif isinstance(picture, Image.Image):
        picture.save(buffer, format="png")
    else:
        raise TypeError(f"{type(picture).__name__} is no picture: give a matplotlib Figure, a PIL image or a tensor")
    return buffer.getvalue()


def show(picture: object, alt: str = "") -> None:
    """Show a figure or picture below the cell; alt: what it shows, for those who cannot see it."""
    from IPython.display import Image, display

    display(Image(png(picture), alt=alt or None))
