"""One quantized weight: what the file holds for a layer, and what it means. Plain torch; the file contract lives here.

A layer `L` computes y = x' Wq^T + (x' D^T) U^T + b with x' = x * pre_quant_scale and

    Wq[n, k] = (code - 8) * scale[k // G, n] + zero[k // G, n]      4 bits and fewer, two codes a byte
    Wq[n, k] = code * scale[k // G, n] + zero[k // G, n]            8 bits, codes in -128..127
    Wq[n, k] = codebook[code] * scale[k // G, n]                    with a codebook (NF4)

so the dense layer it stands for is `dequantize()` = (Wq + U D) * pre_quant_scale. The 4-bit layout, names and formula
are those of comfy-kitchen's awq_w4a16. A convolution is the same with K running over (kh, kw, in), OHWI: groups lie
along channels, and the dequantized weight is channels-last for free; or, where it is `flat`, over (in, kh, kw), the
order that GGUF cuts its groups in, across kernels. Its pre_quant_scale is per input channel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MARK = "comfy_quant"
FORMATS = {"awq_w4a16": 4, "onestep_int8": 8, "onestep_codebook": 4}
"""the formats of this module and the bits a code takes in the file"""
SUFFIXES = {
    "codes": "weight",
    "scale": "weight_scale",
    "zero": "weight_zero",
    "pre_quant_scale": "pre_quant_scale",
    "down": "low_rank_down",
    "up": "low_rank_up",
    "codebook": "weight_codebook",
}
"""field -> the last part of its key in the file: `L.weight`, `L.weight_scale`, ..."""
LARGEST = 1 << 31
"""a weight of more numbers than this is taken for a damaged or hostile header"""


class QuantError(ValueError):
    """Tensors that break the contract. The first line names the layer (and, where a loader adds it, the file)."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The tensors of one layer, in the file's layout. Everything else about it is derived from their shapes."""

    codes: Tensor
    """(N, K/2) int8, low nibble = even column; (N, K) int8 where bits is 8"""
    scale: Tensor
    """(K/G, N) float"""
    zero: Tensor | None
    """(K/G, N) float: what code 8 stands for (code 0 of 8 bits); None is 0"""
    shape: tuple[int, ...]
    """of the dense weight: (N, K), or (out, in, kh, kw) with K = kh * kw * in"""
    bits: int = 4
    """8, or how many of a nibble's bits are used: 4, 3, 2"""
    pre_quant_scale: Tensor | None = None
    """(in,): the layer computes on x * pre_quant_scale"""
    down: Tensor | None = None
    """low-rank branch: (R, *shape[1:])"""
    up: Tensor | None = None
    """(N, R)"""
    codebook: Tensor | None = None
    """(16,): what the codes stand for, in place of code - 8"""
    int8_activations: bool = False
    """made for integer matmul with activations rounded to 8 bits (W8A8)"""
    flat: bool = False
    """a convolution's columns run over (in, kh, kw)"""

    @property
    def out_features(self) -> int:
        """N, the rows."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """K: columns of the matrix; kh * kw * in for a convolution."""
        return math.prod(self.shape[1:])

    @property
    def group_size(self) -> int:
        """Columns that share a scale; all of them for one scale a row."""
        return self.in_features // self.scale.shape[0]

    @property
    def format(self) -> str:
        """The name of its format in the file."""
        return "onestep_codebook" if self.codebook is not None else "onestep_int8" if self.bits == 8 else "awq_w4a16"

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.fields().values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored, over the dense weight's numbers."""
        return 8 * self.nbytes / math.prod(self.shape)

    def fields(self) -> dict[str, Tensor]:
        """field name -> tensor, without what is None."""
        return {f: t for f in SUFFIXES if (t := getattr(self, f)) is not None}

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        return replace(self, **{f: t.to(device) for f, t in self.fields().items()})

    # ---------------------------------------------------------------------------------------------- meaning

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Wq, (N, K): without the low-rank branch, before pre_quant_scale."""
        codes = self.codes if self.bits == 8 else unpack_nibbles(self.codes)
        scale = self.scale.to(dtype).t().unsqueeze(-1)  # (N, K/G, 1)
        if self.codebook is not None:
            w = self.codebook.to(dtype)[codes.long()]
        else:
            w = codes.to(dtype) - (0 if self.bits == 8 else 8)
        w = w.view(self.out_features, -1, self.group_size) * scale
        if self.zero is not None:
            w = w + self.zero.to(dtype).t().unsqueeze(-1)
        return w.reshape(self.out_features, self.in_features)

    def unrolled(self, matrix: Tensor) -> Tensor:
        """Some rows (n, K) of a matrix like Wq -> (n, *shape[1:]), a view: what `from_matrix` is where not flat."""
        shape = (len(matrix), *self.shape[1:])
        return matrix.view(shape) if self.flat else from_matrix(matrix, shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight this stands for, in `shape` (channels-last memory for a convolution)."""
        w = self.unrolled(self.matrix(dtype))
        if self.up is not None:
            w = w + (self.up.to(dtype) @ self.down.to(dtype).flatten(1)).view(self.shape)
        if self.pre_quant_scale is not None:
            w = w * self.pre_quant_scale.to(dtype).view(-1, *[1] * (len(self.shape) - 2))
        return w

    # ---------------------------------------------------------------------------------------------- file

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """The file's entries for the layer called `prefix` (no trailing dot)."""
        tensors = {f"{prefix}.{SUFFIXES[f]}": t.contiguous() for f, t in self.fields().items()}
        spec = {"format": self.format, "group_size": self.group_size, "orig_shape": list(self.shape)}
        if self.bits not in (4, 8):
            spec["bits"] = self.bits
        if self.pre_quant_scale is not None:
            spec["pre_quant_scale"] = True
        if self.up is not None:
            spec["rank"] = self.up.shape[1]
        if self.int8_activations:
            spec["int8_activations"] = True
        if self.flat:
            spec["flat"] = True
        return tensors | {f"{prefix}.{MARK}": to_bytes(spec)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> QuantizedWeight:
        """Read and check the layer called `prefix`. Raises QuantError naming it, the value and the cure.

        Accepts comfy-kitchen's own names and shapes too: no orig_shape (a Linear), `weight_zeros`.
        """
        spec = read_mark(tensors, prefix)
        found = {f: tensors[f"{prefix}.{s}"] for f, s in SUFFIXES.items() if f"{prefix}.{s}" in tensors}
        if "zero" not in found and f"{prefix}.weight_zeros" in tensors:
            found["zero"] = tensors[f"{prefix}.weight_zeros"]
        return _checked(prefix, spec, found)


def read_mark(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """`L.comfy_quant` -> its JSON object. Raises QuantError where it is none."""
    spec = from_bytes(tensors[f"{prefix}.{MARK}"])
    if spec is None or not isinstance(spec.get("format"), str):
        raise QuantError(f"layer {prefix}: its {MARK} is not a JSON object with a format. Quantize the model again.")
    return spec


def to_bytes(spec: Mapping[str, Any]) -> Tensor:
    """A JSON object as a tensor of bytes."""
    return torch.tensor(list(json.dumps(spec).encode()), dtype=torch.uint8)


def from_bytes(mark: Tensor) -> dict[str, Any] | None:
    """The JSON object that a tensor of bytes holds; None where it holds none."""
    try:
        spec = json.loads(mark.to(torch.uint8).cpu().numpy().tobytes()) if mark.numel() < 1 << 16 else None
    except (ValueError, RecursionError):
        return None
    return spec if isinstance(spec, dict) else None


def _checked(layer: str, spec: dict[str, Any], found: dict[str, Tensor]) -> QuantizedWeight:
    """Shapes and types against the contract, before anything is computed from them."""

    def need(ok: bool, problem: str) -> None:
        if not ok:
            raise QuantError(f"layer {layer}: {problem}. The file is damaged or of another version: quantize it again.")

    fmt = spec["format"]
    need(fmt in FORMATS, f"format {fmt!r} is none of {', '.join(FORMATS)}")
    width = FORMATS[fmt]
    bits = spec.get("bits", width)
    need(bits in (2, 3, 4) if width == 4 else bits == 8, f"{bits!r} bits")
    need("codes" in found and "scale" in found, "weight or weight_scale is missing")
    codes = found["codes"]
    need(codes.ndim == 2 and codes.dtype in (torch.int8, torch.uint8), f"weight is {codes.dtype} {tuple(codes.shape)}")
    n, k = codes.shape[0], codes.shape[1] * (1 if width == 8 else 2)
    shape = spec.get("orig_shape", [n, k])
    need(isinstance(shape, list) and len(shape) in (2, 4), f"orig_shape is {shape!r}")
    need(all(isinstance(s, int) and 0 < s < LARGEST for s in shape), f"orig_shape is {shape!r}")
    need(0 < math.prod(shape) < LARGEST, f"orig_shape is {shape!r}")
    need((shape[0], math.prod(shape[1:])) == (n, k), f"weight holds {n} x {k} codes where orig_shape is {shape}")
    group = spec.get("group_size", 64)
    need(isinstance(group, int) and 0 < group <= k and k % group == 0, f"group_size {group!r} does not divide {k}")
    expected = {
        "scale": (k // group, n),
        "zero": (k // group, n),
        "pre_quant_scale": (shape[1],),
        "codebook": (16,),
    }
    if "up" in found or "down" in found:
        need("up" in found and "down" in found and found["up"].ndim == 2, "half of its low-rank branch is missing")
        rank = found["up"].shape[1]
        expected |= {"up": (n, rank), "down": (rank, *shape[1:])}
    for name, size in expected.items():
        if name in found:
            t = found[name]
            need(tuple(t.shape) == size, f"{SUFFIXES[name]} is {tuple(t.shape)}, not {size}")
            need(t.is_floating_point(), f"{SUFFIXES[name]} is {t.dtype}, not a float")
    need((fmt == "onestep_codebook") == ("codebook" in found), "codebook and format disagree")
    for key, field in (("pre_quant_scale", "pre_quant_scale"), ("rank", "up")):
        need(bool(spec.get(key)) <= (field in found), f"{SUFFIXES[field]} is missing")
    flags = {name: bool(spec.get(name)) for name in ("int8_activations", "flat")}
    found = {"zero": None} | found | {"codes": codes.view(torch.int8)}
    return QuantizedWeight(shape=tuple(shape), bits=bits, **flags, **found)


# --------------------------------------------------------------------------------------------- layout


def to_matrix(weight: Tensor) -> Tensor:
    """Dense weight -> (N, K): (out, in, kh, kw) to OHWI rows, a matrix as it is."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


def from_matrix(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_matrix`; a view, so a convolution's weight comes out channels-last."""
    if len(shape) == 2:
        return matrix
    out, channels, kh, kw = shape
    return matrix.view(out, kh, kw, channels).permute(0, 3, 1, 2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """(N, K) of 0..15 -> (N, K/2) int8, low nibble = even column."""
    codes = codes.to(torch.uint8)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(N, K/2) int8 -> (N, K) uint8 of 0..15."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def group_for(channels: int, group_size: int) -> int | None:
    """The group that a layer with that many input channels gets when `group_size` is asked for.

    The smallest divisor of channels from group_size up, else the largest below; None where there is none of 16 or more.
    """
    divisors = [d for d in range(16, channels + 1, 2) if channels % d == 0]
    above = [d for d in divisors if d >= group_size]
    return above[0] if above else divisors[-1] if divisors else None


def narrowed(t: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """The same numbers in `dtype`; as they are where that cannot hold them."""
    wider = t.itemsize < dtype.itemsize  # float8, of which torch has no abs
    return t.to(dtype) if wider or not t.numel() or t.abs().max() <= torch.finfo(dtype).max else t


def layers(keys: Mapping[str, Any]) -> list[str]:
    """The names of all layers in a state dict that carry a mark."""
    return [k.removesuffix("." + MARK) for k in keys if k.endswith("." + MARK)]
