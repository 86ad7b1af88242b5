"""The README's sample sheet, docs/samples.png, and its table of figures, from the bundled models.

python benchmarks/pictures.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from distill.backbones import load
from distill.backbones.drawing import to_pil
from distill.file.metadata import read_metadata
from distill.tutorial import shapes
from distill.tutorial.bundled import bundled
from distill.tutorial.rows import table


def sheet(path: Path, columns: int = 12, rows: int = 4, scale: int = 2) -> None:
    """Random prompts, not picked: `rows` of the teacher's pictures over as many of the student's, same noise."""
    g = torch.Generator().manual_seed(0)
    attributes = shapes.sample_attributes(columns * rows, g, held_out=None)
    prompts = [shapes.prompt(a) for a in attributes]
    images = []
    for name in ("teacher", "student"):
        images += to_pil(load(bundled(name)).sample(prompts, torch.Generator().manual_seed(0)))
    side, gap = shapes.SIZE, 6
    out = Image.new("RGB", (columns * side, 2 * rows * side + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        out.paste(image, (column * side, row * side + (gap if row >= rows else 0)))
    out.resize((out.width * scale, out.height * scale), Image.Resampling.NEAREST).save(path)


def figures() -> str:
    """The README's table, from the files' metadata (`python -m distill.tutorial.build measure` made them)."""
    metas = {name: read_metadata(bundled(name)).metrics for name in ("student", "teacher")}
    return table({f"{name}, {row}": report for name, rows in metas.items() for row, report in rows.items()})


if __name__ == "__main__":
    docs = Path(__file__).parent.parent / "docs"
    sheet(docs / "samples.png")
    print(figures())
