"""`distill eval`: its rows, and where they go."""

import json
import re
from pathlib import Path

import torch

from distill.file.metadata import read_metadata
from distill.tutorial.bundled import bundled
from distill.tutorial.metrics import COLUMNS


def test_the_figures_are_printed_and_written(place, door, monkeypatch):
    asked = []

    def measured(generate, judge, **how):
        """In place of the measuring, which takes minutes; the pictures are real."""
        pictures = generate(["a red ring on a white background"] * 2, torch.Generator().manual_seed(0))
        asked.append((tuple(pictures.shape), how))
        return {"n": how["n"], "seeds": [7, 8], "each": {}} | {field: 0.5 for field in COLUMNS.values()}

    monkeypatch.setattr("distill.tutorial.metrics.evaluate_seeds", measured)
    monkeypatch.setattr("distill.tutorial.rows.evaluate_seeds", measured)
    code, out, err = door("eval", "--n", 16, "--seeds", 2, "--seed", 7, "--out", "new/figures.json", "--device", "cpu")
    assert code == 0, err
    assert not err  # of 2 pictures in 2,128 no tenth is full
    assert asked == [((2, 3, 64, 64), {"n": 16, "seeds": 2, "first": 7})] * 3
    steps = read_metadata(bundled("teacher")).steps
    rows = json.loads(Path("new/figures.json").read_text())
    expected = {"student.safetensors, 1 step", f"teacher, {steps} steps", "real pictures, encoded", "real pictures"}
    assert expected <= set(rows)
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "columns are of one width each"
    assert re.search(r"\| short +\| short clean +\|", lines[0]) and len(lines) == 2 + len(rows)
