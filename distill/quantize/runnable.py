"""A model that is being quantized, as something that runs: to calibrate it, and to see what rounding does to it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..packed.weight import QuantizedWeight, layers
from .calibrate import LayerStats, collect
from .options import Progress, Quantize
from .source import Source, relative
from .stream import IN_MEMORY, rounding_activations, stream
from .views import Dequantized, Renamed

CHEAP = 2e10
"""weights run through (those of the model times the candidates tried) up to which sensitivity is measured end to end:
minutes on a CPU. A model of 50 M weights with 100 layers is there; above it each layer is judged by itself"""


class Runnable:
    """Modules without weights, fed from the file; `names` tells which of them are layers to quantize."""

    def __init__(self, modules: dict[str, nn.Module], keys: Mapping[str, str], source: Source):
        """keys: name of a parameter in `modules` ("unet.conv_in.weight") -> its key in the file."""
        self.modules, self.keys = nn.ModuleDict(modules), dict(keys)
        self.size = sum(source.entries[k].numel for k in self.keys.values())
        self.weights = ChainMap({}, Renamed(source, self.keys, keep=self.size < IN_MEMORY))
        self.names = {n.removesuffix(".weight"): k.removesuffix(".weight") for n, k in self.keys.items()}
        self.module_of = {layer: name for name, layer in self.names.items()}
        stream(self.modules, self.weights)
        self.reference: Tensor | None = None

    def run(self, progress: Progress) -> None:
        """Work as in real use, on all calibration prompts."""
        raise NotImplementedError

    def start(self) -> None:
        """Make the inputs of `outputs`, after `run`."""

    def outputs(self) -> Tensor:
        """What the model puts out on a few fixed inputs."""
        raise NotImplementedError

    def pictures(self, outputs: Tensor) -> Tensor | None:
        """Those outputs as pictures in [-1, 1], where there is a decoder."""
        return None

    # ------------------------------------------------------------------------------------ what quantizing asks

    def calibrate(self, chosen: list[str], options: Quantize, progress: Progress) -> dict[str, LayerStats]:
        """Run, and tell what flowed into each of the chosen layers (by its key in the file)."""
        wanted = set(chosen)
        kinds = (nn.Linear, nn.Conv2d)
        modules = dict(self.modules.named_modules())
        names = {n: k for n, k in self.names.items() if k in wanted and isinstance(modules.get(n), kinds)}
        stats = collect(self.modules, names, lambda: self.run(progress), options.rows, options.seed)
        with torch.no_grad():
            self.start()
            self.reference = self.outputs()
        return stats

    def is_cheap(self, runs: int) -> bool:
        """Whether so many runs take minutes rather than hours."""
        return runs * self.size <= CHEAP

    @torch.no_grad()
    def damage(self, layer: str, dense: Tensor, q: QuantizedWeight) -> float:
        """Squared relative error of the outputs with one layer quantized."""
        if layer not in self.module_of:
            return 0.0  # the run never uses it
        name = self.module_of[layer] + ".weight"
        self.weights.maps[0][name] = q.dequantize()
        try:
            return self.error(self.outputs()) ** 2
        finally:
            del self.weights.maps[0][name]

    @torch.no_grad()
    def compare(self, tensors: Mapping[str, Tensor]) -> tuple[float, float | None]:
        """Relative L2 error of the outputs with a quantized state dict, and the PSNR in dB of the pictures."""
        quantized = {self.module_of[n]: QuantizedWeight.from_tensors(tensors, n) for n in self.used(tensors)}
        self.weights.maps.insert(0, Renamed(Dequantized(tensors), self.keys))
        try:
            with rounding_activations(self.modules, quantized):
                found = self.outputs()
        finally:
            self.weights.maps.pop(0)
        before, after = self.pictures(self.reference), self.pictures(found)
        psnr = None if before is None else 10 * (4 / (before - after).square().mean().clamp(min=1e-12)).log10().item()
        return self.error(found), psnr

    def used(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The quantized layers that a run meets."""
        return [n for n in layers(tensors) if n in self.module_of]

    def error(self, outputs: Tensor) -> float:
        """Relative L2 error against the dense model's outputs."""
        return relative(outputs, self.reference)
