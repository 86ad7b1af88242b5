"""Draws docs/icon.png for the Comfy registry: noise, one step, a picture.

python docs/icon.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE, CELLS, FINE = 400, 8, 4  # pixels, squares of noise a side, drawn so many times larger
BLUE, YELLOW, SHADOW = (58, 98, 190), (255, 208, 50), (40, 68, 135)


def draw() -> Image.Image:
    """A 400x400 picture: a yellow star on blue, and squares of noise where it has not become blue yet."""
    icon = Image.new("RGB", (SIDE * FINE, SIDE * FINE), BLUE)
    pen, cell, random = ImageDraw.Draw(icon), SIDE * FINE // CELLS, np.random.default_rng(3)
    for y in range(CELLS):
        for x in range(CELLS - y):
            noise = tuple(random.normal(128, 60, 3).clip(0, 255).astype(int).tolist())
            pen.rectangle((x * cell, y * cell, (x + 1) * cell, (y + 1) * cell), fill=noise)
    for shift, colour in ((12, SHADOW), (0, YELLOW)):
        pen.polygon([(x + shift * FINE, y + shift * FINE) for x, y in star()], fill=colour)
    return icon.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def star() -> list[tuple[float, float]]:
    """Ten corners, a little below the middle, as a star's tips reach higher than its feet."""
    corners = []
    for i in range(10):
        radius, angle = (150, 64)[i % 2] * FINE, math.pi * (i / 5 - 0.5)
        corners.append((SIDE * FINE / 2 + radius * math.cos(angle), 212 * FINE + radius * math.sin(angle)))
    return corners


if __name__ == "__main__":
    draw().save(Path(__file__).with_suffix(".png"), optimize=True)
