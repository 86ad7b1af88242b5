"""Quantized models for loaders that lack OneStep: `write("model.gguf", weights, metadata, "gguf:Q4_0")`."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from ...header import CheckpointError
from ..options import Progress, Quantize
from ..report import Layer, Report
from ..source import Source
from ..views import Dequantized, Renamed
from . import comfy, gguf
from .base import Written, in_ldm_names, quantizable

__all__ = ["Written", "export_file", "write"]

BITS = {"gguf": 4.5, "gguf:Q4_0": 4.5, "gguf:Q4_1": 5.0, "gguf:Q5_0": 5.5, "gguf:Q5_1": 6.0, "gguf:Q8_0": 8.5} | {
    "int8_tensorwise": 8.0, "convrot_w4a4": 4.0, "asym_w4a8_int8": 4.5, "nvfp4": 4.5,
}  # fmt: skip
"""bits a weight, as the formats define them; a row's own scale is not counted"""


def export_file(
    source: Source, out: Path, options: Quantize, plan: dict[str, str], progress: Progress, started: float
) -> Report:
    """Write `out` in `options.format`, all that this format quantizes but what `options.keep` names."""
    weights = in_ldm_names(out, source)
    names = getattr(weights, "names", {})  # new key -> old one
    only = None
    if options.keep:
        chosen = (k.removesuffix(".weight") for k in quantizable(weights, None)[0])
        only = [k for k in chosen if not any(re.search(pattern, k) for pattern in options.keep)]
    done = write(out, weights, source.card, options.format, only, progress)
    why = "data-free: this format rounds by its own rules"
    report = Report(str(source.path), str(out), options.format, why, size_before=source.nbytes)
    for new in weights:
        layer = new.removesuffix(".weight")
        entry = source.entries[names.get(new, new)]
        if not new.endswith(".weight") or names.get(new, new).removesuffix(".weight") not in plan:
            continue
        if layer in done.layers:
            bits = BITS.get(options.format, 16.0)
            report.layers.append(Layer(layer, options.format, entry.numel, bits, done.layers[layer], "weight"))
        else:
            report.layers.append(Layer(layer, f"dense ({done.dense.get(layer, 'not chosen')})", entry.numel, 16.0))
    report.size_after, report.seconds = out.stat().st_size, time.monotonic() - started
    return report


def write(
    path: str | Path,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    format: str,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Quantize `weights` (dense, or of the contract, which is dequantized first) and write them to `path`.

    format: int8_tensorwise, convrot_w4a4, asym_w4a8_int8, nvfp4; gguf (Q4_0) or gguf:Q4_1, :Q5_0, :Q5_1, :Q8_0, :F16,
    :BF16.
    only: layers (keys without `.weight`) to quantize; default: all in repeated blocks.
    Raises CheckpointError naming the file and the cure, ImportError where the package that knows the format is missing.
    """
    path = Path(path)
    name, _, variant = format.partition(":")
    weights = in_ldm_names(path, Dequantized(weights))
    if only is not None and isinstance(weights, Renamed):
        only = {
            new.removesuffix(".weight") for new, old in weights.names.items() if old.removesuffix(".weight") in only
        }
    if name == "gguf":
        return gguf.write(path, weights, metadata, variant or "Q4_0", only, progress)
    if format not in comfy.FORMATS:
        known = ", ".join((*comfy.FORMATS, *(f"gguf:{t}" for t in gguf.TYPES)))
        raise CheckpointError(f"{path}: unknown format {format!r}. Choose one of {known}.")
    return comfy.write(path, weights, metadata, format, only, progress)
