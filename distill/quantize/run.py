"""A model file in, a quantized one out: the walk over its tensors.

    report = quantize_file(bundled("student"), Path("student-4bit.safetensors"), Quantize())
    print(report.table())

Three passes at most: calibrate (where the model can be run), measure how sensitive each layer is (where there is a
budget), quantize. Each reads one layer at a time.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..atomic import write_beside
from ..packed.weight import QuantError
from .calibrate import LayerStats
from .layerwise import Progress, Walk
from .report import Report
from .source import Source, layers_of, open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantize:
    """How to quantize a model."""

    method: Literal["auto", "rtn", "clip", "scale", "awq", "svd", "smoothquant"] = "auto"
    """auto: awq where the model could be run for calibration, else clip (a low-rank branch without calibration takes
    0.4 bits for 5 % less error; groups of 32 give 14 % for 0.5). rtn: round to nearest. clip: the best range of each
    group. scale: AWQ's activation-aware scales alone. awq: those, then clip. svd: smoothing and a low-rank branch in
    16 bits. smoothquant: 8 bits for weights and activations (W8A8)."""
    bits: Literal[2, 3, 4, 8] = 4
    """A code's bits. Codes of 2 and 3 bits are stored in 4."""
    group_size: int = 64
    """Numbers that share a scale; 128 and 64 are close, 32 is better by a bit's half (reference/quantization.md)."""
    budget: float | None = None
    """Mixed precision: at most so many bits a weight on average, everything counted; sensitive layers get 8 or 16."""
    rank: int = 16
    """Of svd's branch. SVDQuant uses 32 for models of billions."""
    alpha: float | None = None
    """SmoothQuant's; its paper's is 0.5. Default: searched for each layer."""
    text_encoder: bool = False
    """Quantize the text encoder of a full checkpoint too."""
    keep: tuple[str, ...] = ()
    """Regular expressions of layers to keep dense, besides the first and the last."""
    format: str = "onestep"
    """onestep: the contract of `distill.packed.weight`. The others are for loaders that lack OneStep, and round by
    their own rules, so that method, bits and groups do not apply: int8_tensorwise, convrot_w4a4, asym_w4a8_int8,
    nvfp4, gguf (which is gguf:Q4_0), gguf:Q4_1, gguf:Q5_0, gguf:Q5_1, gguf:Q8_0."""
    calibrate: bool = True
    """Run the model on prompts to see its activations, where it can be run."""
    prompts: Path | None = None
    """Calibration prompts, one a line. Default: the tutorial world's for its models; a few of ours for others."""
    samples: int | None = None
    """Pictures (or texts) made in calibration. Default: 256 for a OneStep student (64 gave it a sixth more error), 32
    for a teacher, 64 texts, 4 for a diffusers folder."""
    steps: int | None = None
    """Of sampling in calibration. Default: what a OneStep file recommends, 8 for a diffusers folder."""
    rows: int = 256
    """Inputs kept of each layer. Twice and four times as many changed the bundled models' output error by less than a
    tenth, up as often as down."""
    seed: int = 0

    def __post_init__(self):
        if self.group_size < 16:
            raise QuantError(f"group size {self.group_size} is below 16: choose 32, 64 or 128")
        if self.budget is not None and (self.method in ("svd", "smoothquant") or self.format != "onestep"):
            what = self.method if self.format == "onestep" else f"format {self.format}"
            raise QuantError(f"a budget chooses bits for auto, rtn, clip, scale and awq; {what} takes none")
        if self.text_encoder and self.format != "onestep":
            raise QuantError(f"format {self.format} quantizes diffusion models only: leave out --text-encoder")
        for pattern in self.keep:
            try:
                re.compile(pattern)
            except re.error as e:
                raise QuantError(f"keep: {pattern!r} is no regular expression ({e})") from None


def quantize_file(
    source: str | Path,
    out: str | Path,
    options: Quantize | None = None,
    stats: Mapping[str, LayerStats] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize `source` (a safetensors file, or a folder of diffusers' or transformers') into the file `out`.

    stats: what each layer was seen to take in, by its key in the file without `.weight`, from `calibrate.collect`;
    without them a OneStep file or a folder is run on prompts, and any other file is quantized by its weights alone.
    Raises CheckpointError for a file that cannot be read, QuantError for options that do not fit it.
    """
    options, out, started = options or Quantize(), Path(out), time.monotonic()
    progress = progress or (lambda done, total, what: None)
    source = open_source(source)
    parts = ("unet", "text") if options.text_encoder or source.part("")[0] == "text" else ("unet",)
    plan = layers_of(source, parts, options.group_size, options.keep)
    if not any(why == "" for why in plan.values()):
        raise QuantError(f"{source.path}: no layer to quantize. Name a diffusion model or a text encoder.")
    if options.format != "onestep":
        from .export.file import write

        return write(source, out, options, plan, progress, started)

    subject, calibration = _calibration(source, options, parts, stats)
    if subject is not None:
        stats = subject.calibrate([k for k, why in plan.items() if why == ""], options, progress)
    method = method_of(options, stats, calibration)
    stats = {k.removesuffix(".weight"): s for k, s in (stats or {}).items()}
    unseen = [k for k, why in plan.items() if why == "" and k not in stats]
    if stats and unseen:
        log.warning(
            "%d layers never ran in calibration and go by their weights: %s", len(unseen), ", ".join(unseen[:5])
        )
    report = Report(str(source.path), str(out), method, calibration, size_before=source.nbytes)
    work = Walk(source, options, method, stats, progress)
    choices, report.sensitivity = work.choose(plan, subject)
    weights, report.layers = work.quantize(plan, choices, parts)
    metadata = source.card | {"quantization": json.dumps(_card(options, method) | report.summary())}
    save(out, weights, metadata)
    report.size_after = out.stat().st_size
    if subject is not None:
        report.output_error, report.psnr = subject.compare(weights)
    report.seconds = time.monotonic() - started
    return report


def method_of(options: Quantize, stats: Mapping | None, why: str) -> str:
    """The method `auto` stands for. Raises QuantError where a method needs what is not there."""
    if options.method == "auto":
        return "awq" if stats else "clip"
    if options.method in ("scale", "awq") and not stats:
        raise QuantError(f"method {options.method} needs calibration ({why}). Use auto or clip, which do without.")
    return options.method


def _calibration(source: Source, options: Quantize, parts, stats):
    """What can be run, and what to say about it: (subject or None, text)."""
    if stats is not None:
        return None, "calibrated by the caller"
    if not options.calibrate:
        return None, "data-free: not asked to calibrate"
    from .models import open_subject

    subject, said = open_subject(source, options, parts)
    if subject is None:
        log.warning("%s: quantized by its weights alone, %s", source.path, said)
    return subject, said


def _card(options: Quantize, method: str) -> dict:
    card = asdict(replace(options, method=method, prompts=None))
    return {k: v for k, v in card.items() if k not in ("prompts", "calibrate", "format")} | {"version": 1}


# ------------------------------------------------------------------------------------------------------- writing


def save(out: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write atomically."""
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    write_beside(out, lambda temporary: save_file(weights, temporary, metadata))
