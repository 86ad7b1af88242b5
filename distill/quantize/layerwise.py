"""Over a model's tensors: choose for each layer, quantize it, measure the error; one layer at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..packed.weight import QuantError, QuantizedWeight, group_for
from . import awq, lowrank, rounding, smooth
from .budget import DENSE, Choice, Offer, allocate, candidates
from .calibrate import LayerStats, relative_error
from .options import Progress, Quantize
from .report import Layer
from .runnable import Runnable
from .source import Source, as_stored

log = logging.getLogger(__name__)

Sensitivity = Callable[[str, Tensor, QuantizedWeight], float]  # layer, dense weight, candidate -> damage


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
    if method in ("scale", "awq") and stats is not None:
        return (awq.awq if method == "awq" else awq.scale_search)(weight, stats, choice.bits, choice.group)
    if method == "rtn":
        return rounding.round_to_nearest(weight, choice.bits, choice.group)
    return rounding.clip(weight, choice.bits, choice.group, stats.rows if stats is not None else None)


def method_of(options: Quantize, calibrated: bool, why: str) -> str:
    """The method `auto` stands for. Raises QuantError where a method needs what is not there; why: what to say then."""
    if options.method == "auto":
        return "awq" if calibrated else "clip"
    if options.method in ("scale", "awq") and not calibrated:
        raise QuantError(f"method {options.method} needs calibration ({why}). Use auto or clip, which do without.")
    return options.method


def uniform(options: Quantize, method: str, channels: int) -> Choice:
    """What every layer becomes where there is no budget, with the group that its input channels allow."""
    if method == "smoothquant" or options.bits == 8:
        return Choice(8)
    return Choice(options.bits, group_for(channels, options.group_size), options.rank if method == "svd" else 0)


def described(choice: Choice, q: QuantizedWeight) -> str:
    """What a layer became, for the report: a choice, or the grid of equal size that fitted it better."""
    signed = choice.group and q.zero is None
    return f"{replace(choice, group=q.group_size)}, signed scales" if signed else str(choice)


def tell_unseen(layers: Iterable[str], stats: Mapping[str, LayerStats]) -> None:
    """Warn of layers that calibration, where there was one, never reached."""
    unseen = [layer for layer in layers if layer not in stats]
    if stats and unseen:
        what = "layers never ran in calibration and go by their weights"
        log.warning("%d %s: %s", len(unseen), what, ", ".join(unseen[:5]))


def _sides(weight: Tensor) -> tuple[int, int]:
    return len(weight), weight[0].numel()


@dataclass
class Quantizer:
    """What every pass over the layers needs."""

    source: Source
    options: Quantize
    method: str
    stats: Mapping[str, LayerStats]
    progress: Progress

    def dense(self, layer: str) -> Tensor:
        """A layer's weight in fp32."""
        return self.source[f"{layer}.weight"].float()

    def layer(self, layer: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
        """A layer's weight, quantized. Raises QuantError naming file and layer."""
        try:
            stats = self.stats.get(layer)
            return quantize_layer(weight, choice, self.method, stats, self.options.alpha, self.options.seed)
        except QuantError as e:
            raise QuantError(f"{self.source.path}: layer {layer}: {e}") from None

    def choose(self, plan: dict[str, str], runs: Runnable | None) -> tuple[dict[str, Choice], str]:
        """Each layer's choice, and what decided on it ("" where all are alike)."""
        layers = [layer for layer, why in plan.items() if why == ""]
        if self.options.budget is None:
            channels = {layer: self.source.entries[f"{layer}.weight"].shape[1] for layer in layers}
            return {layer: uniform(self.options, self.method, n) for layer, n in channels.items()}, ""
        measure, said = self.sensitivity(layers, runs)
        offers: dict[str, list[Offer]] = {}
        for i, layer in enumerate(layers):
            self.progress(i, len(layers), "measuring sensitivity")
            offers[layer] = self.offers(layer, measure)
        self.progress(len(layers), len(layers), "measuring sensitivity")
        numel = {layer: self.source.entries[f"{layer}.weight"].numel for layer in plan}
        fixed = sum(16 * n for layer, n in numel.items() if layer not in offers)
        chosen = allocate(offers, self.options.budget, sum(numel.values()), fixed)
        return {layer: offer.choice for layer, offer in chosen.items()}, said

    def sensitivity(self, layers: list[str], runs: Runnable | None) -> tuple[Sensitivity, str]:
        """End to end where the model runs fast enough, else by what each layer puts out, else by its weight."""
        if runs is not None and runs.is_cheap(len(layers) * 4):
            return runs.damage, "the output error of the whole model, one layer at a time"
        kind = "output" if self.stats else "weight"

        def local(layer: str, dense: Tensor, q: QuantizedWeight) -> float:
            return relative_error(dense, q.dequantize(), self.stats.get(layer)) ** 2

        return local, f"the relative error of each layer's {kind}"

    def offers(self, layer: str, measure: Sensitivity) -> list[Offer]:
        """A layer's candidates with their size and damage."""
        dense, found = self.dense(layer), []
        for choice in candidates(dense.shape[1], self.options.bits if self.options.bits < 8 else 4):
            if choice == DENSE:
                found.append(Offer(DENSE, 16.0 * dense.numel(), 0.0))
            else:
                q = self.layer(layer, dense, choice)
                found.append(Offer(choice, 8.0 * q.nbytes, measure(layer, dense, q)))
        return found

    def quantize(
        self, plan: dict[str, str], choices: dict[str, Choice], parts: tuple[str, ...]
    ) -> tuple[dict, list[Layer]]:
        """Every tensor of the file to be, and a line of the report for each matrix."""
        weights: dict[str, Tensor] = {}
        layers: list[Layer] = []
        total = len(self.source)
        for i, key in enumerate(self.source):
            self.progress(i, total, "quantizing")
            layer = key.removesuffix(".weight")
            choice = choices.get(layer, DENSE) if key.endswith(".weight") else DENSE
            if choice == DENSE:
                t = self.source[key]
                weights[key] = as_stored(t) if self.source.part(key)[0] in parts else t
                if layer in plan and key.endswith(".weight"):
                    why, width = plan[layer] or "most sensitive", 8.0 * weights[key].element_size()
                    layers.append(Layer(layer, f"dense ({why})", weights[key].numel(), width))
                continue
            dense, stats = self.dense(layer), self.stats.get(layer)
            q = self.layer(layer, dense, choice)
            weights |= q.to_tensors(layer)
            error = relative_error(dense, q.dequantize(), stats)
            kind = "weight" if stats is None else "output"
            layers.append(Layer(layer, described(choice, q), dense.numel(), q.bits_per_weight, error, kind))
        self.progress(total, total, "quantizing")
        return weights, layers
