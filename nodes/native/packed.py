"""A weight that looks dense from outside: what ComfyUI sees of a quantized layer while it detects, renames and patches.

ComfyUI recognises models by the shapes of their weights, and packed ones have other shapes. So a state dict is given to
it with one `Packed` per quantized layer, which has the dense weight's shape and no memory of its own. Cutting and
joining along the output rows keeps it packed; any other arithmetic gives the dense result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...distill.packed.rows import stack, take
from ...distill.packed.weight import FORMATS, MARK, SUFFIXES, QuantizedWeight, layers, read_mark

aten = torch.ops.aten
HALF = ("nvfp4", "convrot_w4a4")  # stock formats whose weight has two columns a byte


@dataclass(frozen=True)
class StockWeight:
    """A layer in a comfy_quant format of ComfyUI's own: its entries in the file, which only ComfyUI interprets."""

    tensors: dict[str, Tensor]
    """what follows the layer's name and a dot -> tensor"""
    shape: tuple[int, ...]

    @property
    def scale(self) -> Tensor:
        return self.tensors["weight_scale"]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        import comfy.ops

        ops = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=True)
        layer = ops.Linear(self.shape[1], self.shape[0], bias=False, device="cpu")
        layer.load_state_dict({k: v for k, v in self.tensors.items() if k != "bias"}, strict=False)
        return layer.weight.dequantize().to(dtype)


class Packed(Tensor):
    """Read only. `held` is the QuantizedWeight (or StockWeight) it stands for."""

    @staticmethod
    def __new__(cls, held, dtype: torch.dtype, device: torch.device | str | None = None):
        device = held.scale.device if device is None else device
        return Tensor._make_wrapper_subclass(cls, tuple(held.shape), dtype=dtype, device=device)

    def __init__(self, held, dtype: torch.dtype, device=None):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_) -> str:
        return f"Packed({type(self.held).__name__}, {tuple(self.shape)}, {self.dtype})"

    def dense(self) -> Tensor:
        dense = self.held.dequantize(self.dtype)
        return dense if self.device.type == "meta" else dense.to(self.device)  # see fuse.py: it only says so

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        keep = KEEP.get(func)
        kept = keep(*args, **kwargs) if keep else None
        if kept is not None:
            return kept
        if func._schema.is_mutable and isinstance(args[0], Packed):
            raise TypeError(f"{func} would write into a quantized weight. Dequantize it first: weight.clone() + 0.")
        return func(*tree_map_only(Packed, cls.dense, args), **tree_map_only(Packed, cls.dense, kwargs))


# ------------------------------------------------------------------------------- what leaves a weight packed


def _same(p: Packed, *_, **__) -> Packed:
    return Packed(p.held, p.dtype, p.device)


def _to(p: Packed, dtype=None, device=None, **_) -> Tensor:
    device = p.device if device is None else torch.device(device)
    if dtype not in (None, p.dtype):
        return p.held.dequantize(dtype).to(device)
    held = p.held if device == p.device or not isinstance(p.held, QuantizedWeight) else p.held.to(device)
    return Packed(held, p.dtype, device)


def _slice(p: Packed, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Packed | None:
    if dim % len(p.shape) or step != 1:
        return None
    start, end, _ = slice(start, end).indices(p.shape[0])
    return _rows(p, start, end)


def _split(p: Packed, size: int | list[int], dim: int = 0) -> list[Packed] | None:
    if dim % len(p.shape) or not isinstance(p.held, QuantizedWeight):
        return None
    sizes = size if isinstance(size, list | tuple) else [size] * (p.shape[0] // size) + [p.shape[0] % size]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [_rows(p, end - n, end) for n, end in zip(sizes, ends) if n]


def _rows(p: Packed, start: int, end: int) -> Packed | None:
    """Output rows start..end of a layer."""
    if (start, end) == (0, p.shape[0]):
        return _same(p)
    if not isinstance(p.held, QuantizedWeight):
        return None
    return Packed(take(p.held, slice(start, end)), p.dtype, p.device)


def _cat(parts: list, dim: int = 0) -> Packed | None:
    if dim % parts[0].ndim or not all(isinstance(p, Packed) and isinstance(p.held, QuantizedWeight) for p in parts):
        return None
    held = stack([p.held for p in parts])
    return held and Packed(held, parts[0].dtype, parts[0].device)


KEEP = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten._to_copy.default: _to,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.cat.default: _cat,
}


# ------------------------------------------------------------------------------------------------ state dicts


def pack(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A state dict as the file contract writes it -> one entry per weight, quantized ones as Packed.

    dtype: what they pretend to be; None takes that of most of the other weights. Raises QuantError naming the layer.
    """
    dtype = dtype or float_dtype(weights)
    named, packed, parts_of = dict(weights), {}, {}
    for key in weights:
        layer, _, part = key.rpartition(".")
        parts_of.setdefault(layer, []).append(part)
    for layer in layers(weights):
        spec = read_mark(weights, layer)
        if spec["format"] in FORMATS:
            held = QuantizedWeight.from_tensors(weights, layer)
            parts = [*SUFFIXES.values(), "weight_zeros", MARK]
        else:
            parts = [p for p in parts_of[layer] if p != "bias"]
            held = StockWeight({p: weights[f"{layer}.{p}"] for p in parts}, stock_shape(weights, layer, spec))
        for part in parts:
            named.pop(f"{layer}.{part}", None)
        packed[f"{layer}.weight"] = Packed(held, dtype)
    return named | packed


def stock_shape(weights: Mapping[str, Tensor], layer: str, spec: dict) -> tuple[int, ...]:
    shape = list(weights[f"{layer}.weight"].shape)
    if spec["format"] in HALF:
        shape[-1] *= 2
    return tuple(shape)


def float_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point type of most numbers that are not part of a quantized layer; float16 where there are none."""
    inner = {f"{layer}.{s}" for layer in layers(weights) for s in (*SUFFIXES.values(), "weight_zeros")}
    sizes: dict[torch.dtype, int] = {}
    for key, t in weights.items():
        if key not in inner and t.is_floating_point() and t.element_size() > 1:
            sizes[t.dtype] = sizes.get(t.dtype, 0) + t.numel()
    return max(sizes, key=sizes.get) if sizes else torch.float16
