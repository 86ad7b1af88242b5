"""quantize_file for loaders that lack OneStep: `formats` rounds and writes, this lists what it did."""

from __future__ import annotations

import re
import time
from pathlib import Path

from ...packed import formats
from ..layerwise import Progress
from ..report import Layer, Report
from ..source import Source
from .base import candidates, in_ldm_names

BITS = {"gguf": 4.5, "gguf:Q4_0": 4.5, "gguf:Q4_1": 5.0, "gguf:Q5_0": 5.5, "gguf:Q5_1": 6.0, "gguf:Q8_0": 8.5} | {
    "int8_tensorwise": 8.0, "convrot_w4a4": 4.0, "asym_w4a8_int8": 4.5, "nvfp4": 4.5,
}  # fmt: skip
"""bits a weight, as the formats define them; a row's own scale is not counted"""


def write(source: Source, out: Path, options, plan: dict[str, str], progress: Progress, started: float) -> Report:
    """Write `out` in `options.format`, all that this format quantizes but what `options.keep` names."""
    weights = in_ldm_names(out, source)
    names = getattr(weights, "names", {})  # new key -> old one
    only = None
    if options.keep:
        chosen = (k.removesuffix(".weight") for k in candidates(weights, None)[0])
        only = [k for k in chosen if not any(re.search(pattern, k) for pattern in options.keep)]
    done = formats.write(out, weights, source.card, options.format, only, progress)
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
