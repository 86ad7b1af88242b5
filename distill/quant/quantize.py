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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..persist import write_beside
from . import awq, lowrank, rounding, smooth
from .budget import DENSE, Choice, Offer, allocate, candidates
from .calibrate import LayerStats, relative_error
from .report import Layer, Report
from .source import Source, layers_of, open_source
from .weight import QuantError, QuantizedWeight, group_for

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]  # (done, total, what is being done)
Sensitivity = Callable[[str, Tensor, QuantizedWeight], float]  # layer, dense weight, candidate -> damage
STOCK = ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8", "nvfp4", "gguf")


@dataclass(frozen=True)
class Quantize:
    """How to quantize a model."""

    method: Literal["auto", "rtn", "clip", "awq", "svd", "smoothquant"] = "auto"
    """auto: awq where the model could be run for calibration, else clip (a low-rank branch without calibration takes
    0.4 bits for 5 % less error, less than groups of 32 give for 0.5: docs/four_bit_quality.md). rtn: round to nearest.
    clip: the best range of each group. awq: activation-aware scales, then clip. svd: smoothing and a low-rank branch
    in 16 bits. smoothquant: 8 bits for weights and activations (W8A8)."""
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
    format: Literal["onestep", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8", "nvfp4", "gguf"] = "onestep"
    """onestep: the contract of `distill.quant.weight`. The others are for loaders that lack OneStep and round by their
    own rules: method, bits and groups do not apply to them."""
    calibrate: bool = True
    """Run the model on prompts to see its activations, where it can be run."""
    prompts: Path | None = None
    """Calibration prompts, one a line. Default: the tutorial world's for its models; a few of ours for others."""
    samples: int | None = None
    """Pictures (or texts) made in calibration. Default: 64 for a OneStep file, 64 texts, 4 for a diffusers folder."""
    steps: int | None = None
    """Of sampling in calibration. Default: what a OneStep file recommends, 8 for a diffusers folder."""
    rows: int = 256
    """Inputs kept of each layer. More changed nothing in benchmarks/four_bit_quality.py."""
    seed: int = 0

    def __post_init__(self):
        if self.group_size < 16:
            raise QuantError(f"group size {self.group_size} is below 16: choose 32, 64 or 128")
        if self.budget is not None and (self.method in ("svd", "smoothquant") or self.format != "onestep"):
            what = self.method if self.format == "onestep" else f"format {self.format}"
            raise QuantError(f"a budget chooses bits for auto, rtn, clip and awq; {what} takes none")
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
        return _stock(source, out, options, plan, parts, started)

    subject, calibration = _calibration(source, options, parts, stats)
    if subject is not None:
        stats = subject.calibrate([k for k, why in plan.items() if why == ""], options, progress)
    method, stats = method_of(options, stats, calibration), stats or {}
    report = Report(str(source.path), str(out), method, calibration, size_before=source.nbytes)
    work = _Work(source, options, method, {k.removesuffix(".weight"): s for k, s in stats.items()}, progress)
    choices, report.sensitivity = work.choose(plan, subject)
    weights, report.layers = work.quantize(plan, choices, parts)
    metadata = source.metadata | {"quantization": json.dumps(_card(options, method) | report.summary())}
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
    if options.method == "awq" and not stats:
        raise QuantError(f"method awq needs calibration ({why}). Use auto or clip, which do without.")
    return options.method


def _calibration(source: Source, options: Quantize, parts, stats):
    """What can be run, and what to say about it: (subject or None, text)."""
    if stats is not None:
        return None, "calibrated by the caller"
    if not options.calibrate:
        return None, "data-free: not asked to calibrate"
    from .subject import open_subject

    subject, said = open_subject(source, options, parts)
    if subject is None:
        log.warning("%s: quantized by its weights alone, %s", source.path, said)
    return subject, said


def _card(options: Quantize, method: str) -> dict:
    card = asdict(replace(options, method=method, prompts=None))
    return {k: v for k, v in card.items() if k not in ("prompts", "calibrate", "format")} | {"version": 1}


# ------------------------------------------------------------------------------------------------- layer by layer


def quantize_layer(
    weight: Tensor, choice: Choice, method: str, stats: LayerStats | None, alpha: float | None = None, seed: int = 0
) -> QuantizedWeight:
    """One dense weight -> codes, by one method. A layer that calibration never reached goes by its weights."""
    if not weight.isfinite().all():
        raise QuantError("its weight holds numbers that are not finite")
    if method == "smoothquant":
        return smooth.smoothquant(weight, stats, alpha)
    if choice.bits == 8:
        return rounding.channelwise(weight)
    if method == "svd":
        return lowrank.svd(weight, choice.bits, choice.group, min(choice.rank, *_sides(weight)), stats, seed)
    if method == "awq" and stats is not None:
        return awq.awq(weight, stats, choice.bits, choice.group)
    if method == "rtn":
        return rounding.round_to_nearest(weight, choice.bits, choice.group)
    return rounding.clip(weight, choice.bits, choice.group, stats.rows if stats is not None else None)


def _sides(weight: Tensor) -> tuple[int, int]:
    return len(weight), weight[0].numel()


@dataclass
class _Work:
    """What every pass over the layers needs."""

    source: Source
    options: Quantize
    method: str
    stats: Mapping[str, LayerStats]
    progress: Progress

    def dense(self, layer: str) -> Tensor:
        return self.source[f"{layer}.weight"].float()

    def layer(self, layer: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
        try:
            stats = self.stats.get(layer)
            return quantize_layer(weight, choice, self.method, stats, self.options.alpha, self.options.seed)
        except QuantError as e:
            raise QuantError(f"{self.source.path}: layer {layer}: {e}") from None

    def uniform(self, layer: str) -> Choice:
        o = self.options
        if self.method == "smoothquant" or o.bits == 8:
            return Choice(8)
        group = group_for(self.source.entries[f"{layer}.weight"].shape[1], o.group_size)
        return Choice(o.bits, group, o.rank if self.method == "svd" else 0)

    def choose(self, plan: dict[str, str], subject) -> tuple[dict[str, Choice], str]:
        """Each layer's choice, and what decided on it ("" where all are alike)."""
        layers = [layer for layer, why in plan.items() if why == ""]
        if self.options.budget is None:
            return {layer: self.uniform(layer) for layer in layers}, ""
        measure, said = self.sensitivity(layers, subject)
        offers: dict[str, list[Offer]] = {}
        for i, layer in enumerate(layers):
            self.progress(i, len(layers), "measuring sensitivity")
            offers[layer] = self.offers(layer, measure)
        self.progress(len(layers), len(layers), "measuring sensitivity")
        numel = {layer: self.source.entries[f"{layer}.weight"].numel for layer in plan}
        fixed = sum(16 * n for layer, n in numel.items() if layer not in offers)
        chosen = allocate(offers, self.options.budget * sum(numel.values()) - fixed)
        return {layer: offer.choice for layer, offer in chosen.items()}, said

    def sensitivity(self, layers: list[str], subject) -> tuple[Sensitivity, str]:
        """End to end where the model runs fast enough, else by what each layer puts out, else by its weight."""
        if subject is not None and subject.is_cheap(len(layers) * 4):
            return subject.damage, "the output error of the whole model, one layer at a time"
        kind = "output" if self.stats else "weight"

        def local(layer: str, dense: Tensor, q: QuantizedWeight) -> float:
            return relative_error(dense, q.dequantize(), self.stats.get(layer)) ** 2

        return local, f"the relative error of each layer's {kind}"

    def offers(self, layer: str, measure: Sensitivity) -> list[Offer]:
        dense, found = self.dense(layer), []
        for choice in candidates(dense.shape[1], self.options.bits if self.options.bits < 8 else 4):
            if choice == DENSE:
                found.append(Offer(DENSE, 16.0 * dense.numel(), 0.0))
            else:
                q = self.layer(layer, dense, choice)
                found.append(Offer(choice, 8.0 * q.nbytes, measure(layer, dense, q)))
        return found

    def quantize(self, plan: dict[str, str], choices: dict[str, Choice], parts) -> tuple[dict, list[Layer]]:
        """Every tensor of the file to be, and a line of the report for each matrix."""
        weights: dict[str, Tensor] = {}
        layers: list[Layer] = []
        total = len(self.source)
        for i, key in enumerate(self.source):
            self.progress(i, total, "quantizing")
            layer = key.removesuffix(".weight")
            choice = choices.get(layer, DENSE) if key.endswith(".weight") else DENSE
            if choice == DENSE:
                weights[key] = self.as_stored(key, parts)
                if layer in plan and key.endswith(".weight"):
                    why, width = plan[layer] or "most sensitive", 8.0 * weights[key].element_size()
                    layers.append(Layer(layer, f"dense ({why})", weights[key].numel(), width))
                continue
            dense, stats = self.dense(layer), self.stats.get(layer)
            q = self.layer(layer, dense, choice)
            weights |= q.to_tensors(layer)
            error = relative_error(dense, q.dequantize(), stats)
            kind = "weight" if stats is None else "output"
            layers.append(Layer(layer, str(choice), dense.numel(), q.bits_per_weight, error, kind))
        self.progress(total, total, "quantizing")
        return weights, layers

    def as_stored(self, key: str, parts) -> Tensor:
        """A tensor that stays dense: as it is, but fp32 in a quantized part becomes fp16 where that holds it."""
        t = self.source[key]
        if t.dtype == torch.float32 and self.source.part(key)[0] in parts and t.numel():
            return t.half() if t.abs().max() <= 65504 else t
        return t


# ------------------------------------------------------------------------------------------------------- writing


def save(out: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write atomically."""
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    write_beside(out, lambda temporary: save_file(weights, temporary, metadata))


def _stock(source: Source, out: Path, options: Quantize, plan, parts, started: float) -> Report:
    """Through the writers of `formats`, which round by the rules of the loader they write for."""
    raise NotImplementedError
