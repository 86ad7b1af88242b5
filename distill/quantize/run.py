"""A model file in, a quantized one out.

    report = quantize_file(bundled("student"), Path("student-4bit.safetensors"), Quantize())
    print(report.table())

Three passes at most: calibrate (where the model can be run), measure how sensitive each layer is (where there is a
budget), quantize. Each reads one layer at a time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from ..atomic import write_beside
from ..file.workflow import renamed
from ..packed.weight import QuantError
from .calibrate import LayerStats
from .layerwise import Quantizer, method_of, tell_unseen
from .opening import open_runnable
from .options import Progress, Prompts, Quantize
from .report import Report
from .runnable import Runnable
from .source import Source, layers_of, open_source

log = logging.getLogger(__name__)


def quantize_file(
    source: str | Path,
    out: str | Path,
    options: Quantize | None = None,
    stats: Mapping[str, LayerStats] | None = None,
    progress: Progress | None = None,
    *,
    prompts: Prompts | None = None,
    force: bool = False,
) -> Report:
    """Quantize `source` (a safetensors file, or a folder of diffusers' or transformers') into the file `out`.

    stats: what each layer was seen to take in, by its key in the file without `.weight`, from `calibrate.collect`;
    without them a OneStep file or a folder is run on prompts, and any other file is quantized by its weights alone.
    prompts: what to calibrate a OneStep file on where the options name no file. force: overwrite `out`.
    Raises CheckpointError for a file that cannot be read, QuantError for options that do not fit it, FileExistsError.
    """
    options, out, started = options or Quantize(), Path(out), time.monotonic()
    progress = progress or (lambda done, total, what: None)
    source = open_source(source)
    options = checked(source, out, options, force)
    parts = ("unet", "text") if options.text_encoder or source.part("")[0] == "text" else ("unet",)
    plan = layers_of(source, parts, options.group_size, options.keep)
    chosen = [layer for layer, why in plan.items() if why == ""]
    if not chosen:
        raise QuantError(f"{source.path}: no layer to quantize. Name a diffusion model or a text encoder.")
    if options.format != "onestep":
        from .export import export_file

        return export_file(source, out, options, plan, progress, started)

    runs, calibration = _calibration(source, options, parts, stats, prompts)
    if runs is not None:
        stats = runs.calibrate(chosen, options, progress)
    method = method_of(options, bool(stats), calibration)
    stats = {k.removesuffix(".weight"): s for k, s in (stats or {}).items()}
    tell_unseen(chosen, stats)
    report = Report(str(source.path), str(out), method, calibration, size_before=source.nbytes)
    work = Quantizer(source, options, method, stats, progress)
    choices, report.sensitivity = work.choose(plan, runs)
    weights, report.layers = work.quantize(plan, choices, parts)
    metadata = source.card | {"quantization": json.dumps(_card(options, method) | report.summary())}
    if source.is_onestep and "workflow" in metadata:
        metadata["workflow"] = renamed(metadata["workflow"], out.name)
    save(out, weights, metadata)
    report.size_after = out.stat().st_size
    if runs is not None:
        report.output_error, report.psnr = runs.compare(weights)
    report.seconds = time.monotonic() - started
    return report


def checked(source: Source, out: Path, options: Quantize, force: bool) -> Quantize:
    """The options, with the format that the name of `out` asks for. Raises QuantError where name and format differ or
    out is the source, or a file of its folder; FileExistsError where it is there."""
    if out.exists() and any(map(out.samefile, {e.file for e in source.entries.values()})):
        raise QuantError(f"{out} is the source itself: name another file to write")
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists: overwrite it with force, or name another file")
    if out.suffix == ".gguf" and options.format == "onestep":
        log.warning("%s: written as gguf:Q4_0, as its name says; other methods do not apply", out)
        return replace(options, format="gguf:Q4_0")
    if (out.suffix == ".gguf") != options.format.startswith("gguf"):
        suffix = ".gguf" if options.format.startswith("gguf") else ".safetensors"
        raise QuantError(f"{out}: format {options.format} is written to a {suffix} file: rename it")
    return options


def _calibration(
    source: Source, options: Quantize, parts: tuple[str, ...], stats: Mapping | None, prompts: Prompts | None
) -> tuple[Runnable | None, str]:
    """What can be run, and what to say about it."""
    if stats is not None:
        return None, "calibrated by the caller"
    if not options.calibrate:
        return None, "data-free: not asked to calibrate"
    runs, said = open_runnable(source, options, parts, prompts)
    if runs is None:
        log.warning("%s: quantized by its weights alone, %s", source.path, said)
    return runs, said


def _card(options: Quantize, method: str) -> dict:
    card = asdict(replace(options, method=method, prompts=None))
    return {k: v for k, v in card.items() if k not in ("prompts", "calibrate", "format")} | {"version": 1}


# ------------------------------------------------------------------------------------------------------- writing


def save(out: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write atomically."""
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    write_beside(out, lambda temporary: save_file(weights, temporary, metadata))
