"""Running a model that is larger than memory: each module's weights are brought when it runs, and dropped after.

unet = skeleton(lambda: UNet2DConditionModel(**config))     no weights at all
with streamed(unet, weights):                               name -> tensor, read when asked for
    unet(x, t, c)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..packed.weight import QuantizedWeight

IN_MEMORY = 300e6
"""numbers that are rather kept in memory as fp32 than read again and again"""


def stream(module: nn.Module, weights: Mapping[str, Tensor]) -> list:
    """Hooks that fill each submodule's own parameters from `weights` (by name in `module`) while it runs, in fp32."""
    handles = []
    for name, child in module.named_modules():
        own = list(child.named_parameters(recurse=False))
        if own:
            names = {p: f"{name}.{p}" if name else p for p, _ in own}
            handles += _hook(child, names, dict(own), weights)
    return handles


def _hook(child: nn.Module, names: dict[str, str], empty: dict[str, nn.Parameter], weights: Mapping) -> list:
    def fill(module: nn.Module, args) -> None:
        for own, name in names.items():
            t = weights[name]
            if t.shape != empty[own].shape:
                expected = tuple(empty[own].shape)
                raise ValueError(f"{name} is {tuple(t.shape)} where the model's configuration says {expected}")
            module._parameters[own] = nn.Parameter(t.float(), requires_grad=False)

    def drop(module: nn.Module, args, output) -> None:
        for own, parameter in empty.items():
            module._parameters[own] = parameter

    return [child.register_forward_pre_hook(fill), child.register_forward_hook(drop, always_call=True)]


class Renamed(Mapping):
    """A file's tensors under a module's names; small ones may be kept in memory."""

    def __init__(self, source: Mapping[str, Tensor], keys: Mapping[str, str], keep: bool = False):
        self.source, self.keys_, self.keep, self.kept = source, dict(keys), keep, {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        if name not in self.keys_:
            raise KeyError(f"the file has no weight for {name}")
        t = self.source[self.keys_[name]]
        if self.keep:
            self.kept[name] = t = t.float()
        return t

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


class Dequantized(Mapping):
    """A quantized state dict as a dense one, layer by layer: what the model would be with those codes."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and f"{layer}.comfy_quant" in self.tensors:
            return QuantizedWeight.from_tensors(self.tensors, layer).dequantize()
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@contextmanager
def rounding_activations(model: nn.Module, layers: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """The inputs of W8A8 layers (module name -> weight) rounded to 8 bits as integer kernels do, in floats: one scale
    a row for a Linear, one for all of a Conv2d's input."""

    def rounded(q: QuantizedWeight):
        def hook(module: nn.Module, args: tuple):
            x = args[0]
            view = (1, -1, 1, 1) if x.ndim == 4 and len(q.shape) == 4 else (-1,)
            pre = torch.ones(q.shape[1]) if q.pre_quant_scale is None else q.pre_quant_scale.float()
            x = x * pre.view(view)
            step = (x.abs().amax() if len(q.shape) == 4 else x.abs().amax(-1, keepdim=True)).clamp(min=1e-30) / 127
            return ((x / step).round() * step / pre.view(view), *args[1:])

        return hook

    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_pre_hook(rounded(q)) for n, q in layers.items() if q.int8_activations]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
