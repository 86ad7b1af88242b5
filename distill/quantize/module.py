"""One verb for a module in memory: `quantize_(unet, Quantize())`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..packed.layers import install
from ..packed.weight import QuantError, group_for
from .calibrate import collect
from .layerwise import method_of, quantize_layer, tell_unseen, uniform
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
    fits(name, layer): which layers to take, of those whose input channels divide into groups; subclasses, grouped and
    padded otherwise than with zeros stay dense. Afterwards `module.state_dict()` is what `distill quantize` writes for
    it, so it can be saved and loaded. Raises QuantError for a method that needs `run` without it, a mixed-precision
    budget (that takes files), or nothing to quantize.
    """
    options = options or Quantize()
    if options.budget is not None or options.format != "onestep":
        raise QuantError("quantize_ takes one number of bits and the format onestep: use quantize_file for the rest")
    method = method_of(options, run is not None, "pass run")
    chosen = {n: layer for n, layer in module.named_modules() if n and _packable(layer, options) and fits(n, layer)}
    if not chosen:
        raise QuantError("no layer to quantize: none has input channels that divide into groups")
    stats = collect(module, {n: n for n in chosen}, run, options.rows, options.seed) if run is not None else {}
    tell_unseen(chosen, stats)
    packed = dict(module.state_dict())
    for name, layer in chosen.items():
        weight, choice = layer.weight.float().cpu(), uniform(options, method, layer.weight.shape[1])
        try:
            q = quantize_layer(weight, choice, method, stats.get(name), options.alpha, options.seed)
        except QuantError as e:
            raise QuantError(f"layer {name}: {e}") from None
        packed |= q.to(layer.weight.device).to_tensors(name)
    install(module, packed)
    return module


def _packable(layer: nn.Module, options: Quantize) -> bool:
    """Exactly a Linear or a plain Conv2d: a subclass may read its weight itself."""
    if type(layer) not in KINDS or group_for(layer.weight.shape[1], options.group_size) is None:
        return False
    return isinstance(layer, nn.Linear) or (layer.groups == 1 and layer.padding_mode == "zeros")
