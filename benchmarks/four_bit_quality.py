"""What each way to round costs the bundled student and teacher: docs/four_bit_quality.md, docs/four_bit_quality.json.

    OMP_NUM_THREADS=1 python benchmarks/four_bit_quality.py

The student makes n pictures in one step, measured by `distill.tutorial.metrics.evaluate`; the teacher makes `teacher_n`
in its own steps, measured by the same judge. Prompts and noise are the same in every row, so rows differ by the
rounding alone.
Weights are dequantized and run dense (a kernel's own error is not in the table); W8A8 rounds its activations too.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

from distill import layouts
from distill.backbones import load
from distill.backbones.base import Backbone
from distill.packed.weight import QuantizedWeight, layers
from distill.quantize.opening import open_runnable
from distill.quantize.options import Quantize
from distill.quantize.run import quantize_file
from distill.quantize.source import layers_of, open_source
from distill.quantize.stream import rounding_activations
from distill.quantize.views import Dequantized
from distill.tutorial import shapes
from distill.tutorial.bundled import bundled
from distill.tutorial.metrics import Judge, all_right, evaluate, frechet
from distill.tutorial.prompts import calibration_prompts


@dataclass(frozen=True)
class Options:
    """What is measured, and where the page goes."""

    n: int = 256
    """Pictures of the student a row, for prompt accuracy and the Frechet distance; n/4 of held-out prompts."""
    teacher_n: int = 48
    """Pictures of the teacher a row; half as many of held-out prompts."""
    models: tuple[str, ...] = ("student", "teacher")
    only: str = ""
    """A regular expression: only rows whose name it is found in ("4 bits: .*(AWQ|budget)"); the page
    keeps the others, where they are of as many pictures."""
    docs: Path = Path("docs")
    seed: int = 0


def rows(bits: int) -> dict[str, Quantize]:
    """Name of a row -> how it is made. All at groups of 64 (96 where 64 does not divide the channels)."""
    how = {"bits": bits}
    return {
        "round to nearest": Quantize(method="rtn", **how),
        "clip, data-free": Quantize(method="clip", calibrate=False, **how),
        "clip by output error": Quantize(method="clip", **how),
        "AWQ scales": Quantize(method="scale", **how),
        "AWQ scales + clip": Quantize(method="awq", **how),
        "SVD branch, rank 2": Quantize(method="svd", rank=2, **how),
        "SVD branch, rank 16": Quantize(method="svd", rank=16, **how),
        "mixed precision, budget 4.5": Quantize(budget=4.5, **how),
    }


ROWS = {"4 bits": rows(4), "3 bits": rows(3), "8 bits": {"W8A8, SmoothQuant": Quantize(method="smoothquant")}}


def main(o: Options) -> None:
    """Measure every row and write the page."""
    judge, kept = Judge.load(), o.docs / "four_bit_quality.json"
    same = {"n": o.n, "teacher_n": o.teacher_n, "seed": o.seed}
    before = json.loads(kept.read_text()) if o.only and kept.exists() else {}
    found = before["rows"] if same.items() <= before.items() else {}
    for name in o.models:
        source, made = bundled(name), found.setdefault(name, {})
        if "dense" not in made:
            made["dense"] = {"bits_per_weight": 16.0, "packed": 16.0} | measure(load(source), judge, o)
            print(name, "dense", made["dense"], flush=True)
        for group, some in ROWS.items():
            for row, how in some.items():
                if not re.search(o.only, f"{group}: {row}"):
                    continue
                made[f"{group}: {row}"] = one(source, how, judge, o)
                print(name, group, row, made[f"{group}: {row}"], flush=True)
    o.docs.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(same | {"rows": found}, indent=2) + "\n")
    (o.docs / "four_bit_quality.md").write_text(page(found, o))


def one(source: Path, how: Quantize, judge: Judge, o: Options) -> dict:
    """A row: the model quantized in one way, its bits, errors and pictures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.safetensors"
        start = time.monotonic()
        report = quantize_file(source, out, how, prompts=calibration_prompts)
        seconds = time.monotonic() - start
        tensors = load_file(out)
    model, quantized = dequantized(source, tensors)
    if report.output_error is None:  # data-free: measure it as the calibrated rows were
        report.output_error, report.psnr = compared(source, tensors)
    dense = {x.name: x for x in report.layers}
    kept = {"bits_per_weight": report.bits_per_weight, "packed": packed(tensors, dense), "seconds": seconds}
    kept |= {"output_error": report.output_error, "psnr": report.psnr}
    with rounding_activations(model.net, quantized) if how.method == "smoothquant" else nullcontext():
        return kept | measure(model, judge, o)


def dequantized(source: Path, tensors: dict) -> tuple[Backbone, dict[str, QuantizedWeight]]:
    """The dense model with the weights that the codes stand for; and its quantized layers by module."""
    model, dense = load(source), Dequantized(tensors)
    config = model.meta.architecture["unet"]
    names = layouts.unet_to_ldm({k: k for k in model.net.state_dict()}, config)  # file's name -> module's
    model.net.load_state_dict({ours: dense[layouts.UNET + ldm].float() for ldm, ours in names.items()})
    marked = set(layers(tensors))
    quantized = {}
    for ldm, ours in names.items():
        layer = (layouts.UNET + ldm).removesuffix(".weight")
        if ldm.endswith(".weight") and layer in marked:
            quantized[ours.removesuffix(".weight")] = QuantizedWeight.from_tensors(tensors, layer)
    return model, quantized


def compared(source: Path, tensors: dict) -> tuple[float, float]:
    """Output error and PSNR of a quantized state dict, as calibrated rows report theirs."""
    opened, options = open_source(source), Quantize()
    runs, _ = open_runnable(opened, options, ("unet",), calibration_prompts)
    runs.calibrate(list(layers_of(opened, ("unet",), 64)), options, lambda *_: None)
    return runs.compare(tensors)


def packed(tensors: dict, report: dict) -> float:
    """Bits a weight if codes of 3 bits took 3: the file spends 4 on them."""
    bits = total = 0.0
    for name, layer in report.items():
        total += layer.numel
        bits += layer.numel * layer.bits_per_weight
        if f"{name}.comfy_quant" in tensors:
            q = QuantizedWeight.from_tensors(tensors, name)
            bits -= layer.numel * (4 - q.bits) if q.bits < 4 else 0
    return bits / total


def measure(model: Backbone, judge: Judge, o: Options) -> dict:
    """accuracy, held-out accuracy, Frechet distance; and how many pictures are behind them."""
    if model.meta.guidance.get("baked"):  # a student
        r = evaluate(model.sample, judge, o.n)
        return {"accuracy": r.accuracy, "held_out": r.held_out_accuracy, "frechet": r.frechet, "n": o.n}
    g = torch.Generator().manual_seed(1234)
    asked = shapes.sample_attributes(o.teacher_n, g)
    unseen = shapes.sample_attributes(o.teacher_n // 2, g, held_out=True)
    real = judge.read(shapes.render(asked, shapes.sample_style(len(asked), g)))
    made = judge.read(model.sample([shapes.prompt(a) for a in (*asked, *unseen)], g))
    right = all_right(made.attributes, torch.cat([asked, unseen])).float()
    n = o.teacher_n
    distance = frechet(made.features[:n], real.features)
    return {"accuracy": right[:n].mean().item(), "held_out": right[n:].mean().item(), "frechet": distance, "n": n}


def page(found: dict, o: Options) -> str:
    """The tables, as Markdown."""
    text = ["# What rounding costs", "", f"`python benchmarks/four_bit_quality.py --n {o.n} --teacher-n {o.teacher_n}`"]
    text += ["", (__doc__ or "").split("\n\n")[2].strip(), ""]
    for name, some in found.items():
        n, held = some["dense"]["n"], some["dense"]["n"] // (4 if name == "student" else 2)
        text += [f"## The bundled {name} (n = {n}, {held} held out; right is exact to {1 / n:.4f})", ""]
        text += ["| | bits in the file | packed | right | held out | Frechet | output error | PSNR, dB |"]
        text += ["|---|---|---|---|---|---|---|---|"]
        for row, r in some.items():
            error = f"{r['output_error']:.4f} | {r['psnr']:.1f}" if "output_error" in r else "0 | "
            cells = f"{r['bits_per_weight']:.2f} | {r['packed']:.2f} | {r['accuracy']:.3f} | {r['held_out']:.3f}"
            text.append(f"| {row} | {cells} | {r['frechet']:.1f} | {error} |")
        text.append("")
    text += [
        "Bits count everything stored for a matrix weight, the dense first and last layers too; packed is what they",
        "would be if codes of 3 bits did not take 4. Output error is the relative L2 error of x0, PSNR that of the",
        "pictures: in one step for the student, over eight noise levels of its own pictures for the teacher.",
        "",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
