"""Running a model that is larger than memory: each module's weights are brought when it runs, and dropped after.

unet = skeleton(lambda: UNet2DConditionModel(**config))     no weights at all
stream(unet, weights)                                       name -> tensor, read when asked for
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..packed import cpu
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
    def fill(module: nn.Module, args: tuple) -> None:
        for own, name in names.items():
            t = weights[name]
            if t.shape != empty[own].shape:
                expected = tuple(empty[own].shape)
                raise ValueError(f"{name} is {tuple(t.shape)} where the model's configuration says {expected}")
            module._parameters[own] = nn.Parameter(t.float(), requires_grad=False)

    def drop(module: nn.Module, args: tuple, output: object) -> None:
        for own, parameter in empty.items():
            module._parameters[own] = parameter

    return [child.register_forward_pre_hook(fill), child.register_forward_hook(drop, always_call=True)]


@contextmanager
def rounding_activations(model: nn.Module, layers: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """The inputs of W8A8 layers (module name -> weight) rounded as `packed.cpu`'s integer kernels round them, in
    floats: each row of a Linear's input to 127 steps of its largest number, each image of a Conv2d's to 256 codes."""

    def rounded(q: QuantizedWeight) -> Callable:
        def hook(module: nn.Module, args: tuple) -> tuple:
            x = args[0].float()
            if len(q.shape) == 4:
                pre = 1 if q.pre_quant_scale is None else q.pre_quant_scale.float().view(1, -1, 1, 1)
                x = cpu.round_images(x * pre)
            else:
                pre = 1 if q.pre_quant_scale is None else q.pre_quant_scale.float()
                x8, step = cpu.round_rows((x * pre).flatten(0, -2))
                x = (x8 * step).view(x.shape)
            return (x / pre, *args[1:])

        return hook

    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_pre_hook(rounded(q)) for n, q in layers.items() if q.int8_activations]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
