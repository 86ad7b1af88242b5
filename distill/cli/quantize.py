"""`distill quantize`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..quantize.options import Quantize


@dataclass(frozen=True)
class QuantizeFile:
    """Make a 4-bit file of a model: U-Net or transformer, convolutions included; text encoders too."""

    source: tyro.conf.Positional[str]
    """A safetensors file (OneStep, diffusion model, full checkpoint, text encoder), a diffusers folder or one of its
    parts, or the bundled student or teacher."""
    out: tyro.conf.Positional[Path]
    """The file to write: safetensors, or GGUF where it is called so."""
    options: tyro.conf.OmitArgPrefixes[Quantize] = field(default_factory=Quantize)
    report: Path | None = None
    """Also write the whole report, layer by layer, to this JSON file."""
    force: bool = False
    """Overwrite `out` and `report` where they exist."""


def run(o: QuantizeFile) -> None:
    """Quantize, print the report. Raises CheckpointError, QuantError, FileExistsError, ImportError."""
    from ..quantize.run import quantize_file
    from ..tutorial.bundled import find
    from ..tutorial.prompts import calibration_prompts
    from .console import bars, refuse_existing, writable, write_json

    source = find(o.source)
    writable(o.out)
    if o.report:
        writable(o.report, ending=".json")
        refuse_existing(o.report, o.force)
    if not (o.out.exists() and source.exists() and o.out.samefile(source)):
        refuse_existing(o.out, o.force)
    logging.basicConfig(format="%(message)s")
    with bars() as told:

        def progress(done: int, total: int, what: str) -> None:
            told(what, done / max(total, 1))

        report = quantize_file(source, o.out, o.options, None, progress, prompts=calibration_prompts, force=o.force)
    print(report.table())
    if o.report:
        write_json(o.report, report.to_dict())
