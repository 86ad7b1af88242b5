"""Diffusers' names of transformers -> ComfyUI's, with weights that stay packed.

ComfyUI stacks diffusers' to_q, to_k and to_v into one layer by writing them into an empty tensor. Packed weights have
nowhere to write to; while its conversion runs, they are given a `Stack` to write to instead.
"""

from __future__ import annotations

import logging

import comfy.model_detection
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .packed import Packed


class Dense:
    """Stands in for a weight that is not quantized, so that it can go into a stack with others that are."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.scale = tensor, tuple(tensor.shape), tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)


class Stack:
    """Looks enough like an empty tensor to be filled with rows."""

    def __init__(self, shape):
        self.shape, self.parts = tuple(shape), {}

    def narrow(self, dim: int, start: int, length: int) -> Stack | None:
        if dim != 0:
            raise TypeError("ComfyUI stacks this model's weights along their inputs: quantize its single file instead")
        view = Stack((length, *self.shape[1:]))
        view.write = lambda part: self.parts.__setitem__(start, part)
        return view

    def __setitem__(self, where: slice, part) -> None:
        if isinstance(part, Stack):  # a shorter stack moves into a longer one
            self.parts |= part.parts
        else:
            self.write(part)

    def clone(self) -> Stack:
        copy = Stack(self.shape)
        copy.parts = dict(self.parts)
        return copy

    def joined(self, key: str) -> Tensor:
        parts = [self.parts[start] for start in sorted(self.parts)]
        kinds = {type(p.held) for p in parts}
        if kinds == {Dense}:
            return torch.cat([p.held.tensor for p in parts])
        whole = torch.cat(parts)
        if not isinstance(whole, Packed):
            logging.warning(f"OneStep: {key} is made of layers quantized differently: it is kept dense")
        return whole


class Filling(TorchFunctionMode):
    """Inside, an empty tensor for packed weights (they say they are on the meta device) is a Stack."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty_like and isinstance(args[0], Packed):
            return Stack(args[0].shape)
        if func is torch.empty and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return Stack(args[0])
        if func is Tensor.__setitem__ and isinstance(args[0], Packed):  # all of it: halves that change places
            whole, _, part = args
            whole.held = part.held if isinstance(part, Packed) else Dense(part)
            return None
        return func(*args, **kwargs)


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What ComfyUI's convert_diffusers_mmdit makes of them; None where it does not know the model."""
    meta = {}
    for k, t in weights.items():
        if isinstance(t, Packed):
            meta[k] = Packed(t.held, t.dtype, "meta")
        else:
            meta[k] = Packed(Dense(t), t.dtype, "meta") if t.ndim > 1 else t.clone()  # it writes into biases
    with Filling():
        found = comfy.model_detection.convert_diffusers_mmdit(meta, "")
    if found is None:
        return None
    return {k: _back(k, t) for k, t in found.items()}


def _back(key: str, t) -> Tensor:
    if isinstance(t, Stack):
        t = t.joined(key)
    if not isinstance(t, Packed):
        return t
    return t.held.tensor if isinstance(t.held, Dense) else Packed(t.held, t.dtype)
