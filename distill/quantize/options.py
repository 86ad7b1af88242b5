"""How to quantize, and what every pass is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

from ..checks import SEEDS, need, within
from ..packed.weight import QuantError

Progress = Callable[[int, int, str], None]
"""(done, total, what is being done)"""
Prompts = Callable[[Any, int, int], list[str] | None]
"""(the model, how many, seed) -> prompts to calibrate it on, or None for a model it knows none for"""


@dataclass(frozen=True)
class Quantize:
    """How to quantize a model."""

    method: Literal["auto", "rtn", "clip", "scale", "awq", "svd", "smoothquant"] = "auto"
    """auto: awq where the model could be run for calibration, else clip (a low-rank branch without calibration takes
    0.4 bits for 5 % less error; groups of 32 give 14 % for 0.5). rtn: round to nearest. clip: the best range of each
    group; without calibration, a convolution's kernels keep their sums. scale: AWQ's activation-aware scales alone.
    awq: those, then clip. svd: smoothing and a low-rank branch in 16 bits. smoothquant: 8 bits for weights and
    activations (W8A8)."""
    bits: Literal[2, 3, 4, 8] = 4
    """A code's bits. Codes of 2 and 3 bits are stored in 4."""
    group_size: int = 64
    """Numbers that share a scale and a zero, or half as many that share a scale with a sign, where clip and awq find
    that better; 128 and 64 are close, 32 is better, and costs half a bit."""
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
        within(self, rank=(1, inf), alpha=(0, 1), samples=(1, inf), steps=(1, inf), rows=(1, inf), seed=SEEDS)
        code = max(4, self.bits)  # codes of 2 and 3 bits are stored in 4
        enough = self.budget is None or code < self.budget < inf
        need(enough, "budget", self.budget, f"above {code}, the bits of a code, as scales take some too")
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
