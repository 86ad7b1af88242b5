"""One verb for a module in memory: `quantize_(unet, Quantize())`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..packed.layers import install
from ..packed.weight import QuantError, group_for
from .budget import Choice
from .calibrate import collect
from .layerwise import quantize_layer
from .options import Quantize

KINDS = (nn.Linear, nn.Conv2d)


@torch.no_grad()
def quantize_(
    module: nn.Module,
    options: Quantize | None = None,
    run: Callable[[], object] | None = None,
    fits: Callable[[str, nn.Module], bool] = lambda name, layer: True,
) -> nn.Module:
    """Replace a module's Linear and Conv2d layers by packed ones, in place; the module again.

    run: calls the module on typical inputs, so that methods see its activations (auto is awq with it, clip without).
    fits(name, layer): which layers to take; default all whose input channels divide into groups. Afterwards
    `module.state_dict()` is what `distill quantize` writes for it, so it can be saved and loaded. Raises QuantError for
    a method that needs `run` without it, a mixed-precision budget (that takes files), or nothing to quantize.
    """
    options = options or Quantize()
    if options.budget is not None or options.format != "onestep":
        raise QuantError("quantize_ takes one number of bits and the format onestep: use quantize_file for the rest")
    method = options.method if options.method != "auto" else "awq" if run is not None else "clip"
    if method in ("scale", "awq") and run is None:
        raise QuantError(f"method {method} needs calibration: pass run, or use auto or clip, which do without")
    layers = {}
    for name, layer in module.named_modules():
        if name and isinstance(layer, KINDS) and fits(name, layer) and getattr(layer, "groups", 1) == 1:
            if (group := group_for(layer.weight.shape[1], options.group_size)) is not None:
                layers[name] = group
    if not layers:
        raise QuantError("no layer to quantize: none has input channels that divide into groups")
    stats = collect(module, {n: n for n in layers}, run, options.rows, options.seed) if run is not None else {}
    packed = dict(module.state_dict())
    for name, group in layers.items():
        eight = method == "smoothquant" or options.bits == 8
        choice = Choice(8) if eight else Choice(options.bits, group, options.rank if method == "svd" else 0)
        weight = packed[f"{name}.weight"].float()
        try:
            q = quantize_layer(weight, choice, method, stats.get(name), options.alpha, options.seed)
        except QuantError as e:
            raise QuantError(f"layer {name}: {e}") from None
        packed |= q.to_tensors(name)
    install(module, packed)
    return module
