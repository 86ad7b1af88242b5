"""The command line: distill demo | train | sample | eval | quantize | info."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..quantize.run import Quantize
from ..tutorial.bundled import find
from . import demo, eval, train
from .demo import Demo
from .eval import Eval
from .train import Train


@dataclass(frozen=True)
class Sample:
    """Make pictures from prompts with a OneStep file."""

    prompts: tyro.conf.Positional[list[str]]
    """What to draw; quote each prompt."""
    model: str = "student"
    """A OneStep safetensors file, or the bundled student or teacher."""
    out: Path = Path("samples.png")
    """One PNG; the pictures stand side by side."""
    seed: int = 0
    steps: int | None = None
    """Default: what the file recommends."""
    guidance: float | None = None
    """A teacher's guidance; a student has it baked in. Default: what the file recommends."""
    scale: int = 4
    """Enlarge by this, pixel by pixel."""
    device: str = "auto"


@dataclass(frozen=True)
class QuantizeFile:
    """Make a 4-bit file of a model: U-Net or transformer, convolutions included; text encoders too."""

    source: tyro.conf.Positional[str]
    """A safetensors file (OneStep, diffusion model, full checkpoint, text encoder), a diffusers folder or one of its
    parts, or the bundled student or teacher."""
    out: tyro.conf.Positional[Path]
    """The safetensors file to write."""
    options: tyro.conf.OmitArgPrefixes[Quantize] = field(default_factory=Quantize)
    report: Path | None = None
    """Also write the whole report, layer by layer, to this JSON file."""


@dataclass(frozen=True)
class Info:
    """Show what a OneStep file says about itself."""

    model: tyro.conf.Positional[str] = "student"
    """A OneStep safetensors file, or the bundled student or teacher."""


def sample(o: Sample) -> None:
    import torch
    from PIL import Image

    from ..backbones import load
    from ..backbones.base import to_pil
    from .console import pick_device

    model = load(find(o.model), pick_device(o.device))
    how = {"steps": o.steps, "guidance": o.guidance}
    images = to_pil(model.sample(o.prompts, torch.Generator().manual_seed(o.seed), **how))
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * width, 0))
    o.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * o.scale, sheet.height * o.scale), Image.Resampling.NEAREST).save(o.out)
    print(o.out)


def quantize(o: QuantizeFile) -> None:
    from tqdm import tqdm

    from ..quantize.run import quantize_file

    logging.basicConfig(format="%(message)s")
    bars: dict[str, tqdm] = {}

    def show(done: int, total: int, what: str) -> None:
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = tqdm(total=total, desc=what)
        bars[what].update(done - bars[what].n)

    try:
        report = quantize_file(find(o.source), o.out, o.options, progress=show)
    except ImportError as error:  # a format's own package
        raise ValueError(error) from None
    finally:
        for bar in bars.values():
            bar.close()
    print(report.table())
    if o.report:
        report.save(o.report)


def info(o: Info) -> None:
    from ..file.metadata import read_metadata
    from ..header import read_header

    path = find(o.model)
    meta = read_metadata(path)
    tensors = {k: v for k, v in read_header(path).items() if k != "__metadata__"}
    numbers = sum(_product(v["shape"]) for v in tensors.values())
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {len(tensors)} tensors, {numbers / 1e6:.2f} M numbers")
    shown = ("method", "teacher", "prediction", "t_in", "steps", "guidance", "schedule", "latent", "metrics", "config")
    if meta.quantization:
        shown = (*shown, "quantization")
    for name in (*shown, "license"):
        value = getattr(meta, name)
        print(f"{name:>12}  {value if isinstance(value, str) else json.dumps(value)}")


def _product(shape: list[int]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def main() -> None:
    """Run one command; what a user can mend is told in one line, without a traceback."""
    from ..header import CheckpointError
    from ..training.loop import Diverged

    commands = {"demo": Demo, "train": Train, "sample": Sample, "eval": Eval, "quantize": QuantizeFile, "info": Info}
    o = tyro.extras.subcommand_cli_from_dict(commands, prog="distill", description=__doc__)
    actions = {
        Demo: demo.run,
        Train: train.run,
        Sample: sample,
        Eval: eval.run,
        QuantizeFile: quantize,
        Info: info,
    }
    try:
        actions[type(o)](o)
    except KeyboardInterrupt:
        sys.exit(130)
    except (CheckpointError, Diverged, FileExistsError, FileNotFoundError, ValueError) as error:
        sys.exit(f"distill: {error}")
