"""nunchaku's SVDQuant int4 layers -> the contract: 4-bit codes, a low-rank branch and smoothing, number for number.

nunchaku computes y = Wq (x / smooth) + U (D x) + bias with codes -8..7 and a scale for 64 columns. Its tensors lie as a
warp of its CUDA kernels reads them; the orders undone here are those that deepcompressor's backend packs
(deepcompressor/backend/nunchaku/utils.py). Two things beside the layout:

- the linear layer after a GELU takes x + 0.171875 (nothing negative is left, so its activations are unsigned), and its
  bias is written for that; without the shift, the bias gains Wq (0.171875 / smooth)
- modulation layers (W4A16) hold their 3 or 6 parts interleaved row by row, and 1 added to the bias of every scale part
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...header import CheckpointError
from ..rows import stack, take
from ..weight import QuantizedWeight, pack_nibbles

GELU_SHIFT = 0.171875
GROUP = 64
FIELDS = {
    **{n: n for n in ("qweight", "wscales", "wzeros", "wcscales", "wtscale", "bias")},
    **{"smooth": "smooth", "smooth_factor": "smooth", "lora_down": "down", "proj_down": "down"},
    **{"lora_up": "up", "proj_up": "up", "smooth_orig": "", "smooth_factor_orig": ""},
}
"""last part of a key -> what it is, in the names of both of nunchaku's versions; "" is not needed"""


@dataclass(frozen=True)
class Unpacked:
    """One layer as the contract holds it, and its bias."""

    weight: QuantizedWeight
    bias: Tensor | None

    def entries(self, prefix: str) -> dict[str, Tensor]:
        """Its tensors by key."""
        tensors = self.weight.to_tensors(prefix)
        return tensors if self.bias is None else tensors | {f"{prefix}.bias": self.bias}


def layer(path: Path, name: str, parts: dict[str, Tensor], after_gelu: bool = False) -> Unpacked:
    """One layer from its tensors (FIELDS' names). Raises CheckpointError naming file and layer."""
    if parts["qweight"].dtype == torch.int32:
        return _modulation(path, name, parts)
    q = parts["qweight"]
    _need(path, name, q.ndim == 2 and q.dtype == torch.int8, f"qweight is {q.dtype} {tuple(q.shape)}")
    n, k = q.shape[0], 2 * q.shape[1]
    _need(path, name, n > 0 < k and n % 128 == 0 == k % 128, f"{n} x {k} is not a multiple of 128 x 128")
    scale, smooth, bias = parts.get("wscales"), parts.get("smooth"), parts.get("bias")
    _need(path, name, scale is not None, "wscales is missing")
    if "wcscales" in parts or scale.dtype == torch.float8_e4m3fn:
        raise CheckpointError(f"{path}: layer {name} is NVFP4, made for Blackwell cards. Get the file named svdq-int4.")
    for what, t, shape in (("wscales", scale, (k // GROUP, n)), ("smooth", smooth, (k,)), ("bias", bias, (n,))):
        good = t is None or (tuple(t.shape) == shape and t.is_floating_point())
        _need(path, name, good, f"{what} is {getattr(t, 'dtype', None)} {tuple(getattr(t, 'shape', ()))}, not {shape}")
    smooth = None if smooth is None else _in_order(smooth.view(1, k)).flatten().float()
    if smooth is not None:
        _need(path, name, bool((smooth > 0).all()), "smooth is not positive everywhere")
        smooth = None if bool((smooth == 1).all()) else smooth
    weight = QuantizedWeight(
        pack_nibbles(codes(q)),
        _in_order(scale).t().contiguous(),
        None,
        (n, k),
        pre_quant_scale=None if smooth is None else 1 / smooth,
        **_branch(path, name, parts, smooth, n, k),
    )
    bias = None if bias is None else _in_order(bias.view(1, n)).flatten()
    if after_gelu:
        shift = torch.full((k,), GELU_SHIFT) if smooth is None else GELU_SHIFT / smooth
        bias = (torch.zeros(n) if bias is None else bias.float()) + weight.matrix() @ shift
    return Unpacked(weight, bias)


def codes(q: Tensor) -> Tensor:
    """qweight (N, K/2) int8 -> codes 0..15 (8 is zero), (N, K).

    A warp's tile is 128 rows by 64 columns: 8 fragments of 2 x 8 rows; 2 x 4 runs of 8 columns. It is stored as
    (fragment, row of 8, run of 4, which 8 rows, which 4 runs, column).
    """
    n, k = q.shape[0], 2 * q.shape[1]
    packed = q.contiguous().view(torch.uint8).flatten()
    nibbles = torch.stack([packed & 15, packed >> 4], 1).flatten() ^ 8  # two's complement -> 8 is zero
    tiles = nibbles.view(n // 128, k // 64, 8, 8, 4, 2, 2, 8)
    return tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(n, k)


def _in_order(packed: Tensor) -> Tensor:
    """(G, N) as stored -> (N, G): of each 128 rows, lane (i, j) of 8 x 4 holds rows 16 i + 8 s + 2 j + {0, 1}."""
    groups, n = packed.shape
    tiles = packed.contiguous().view(n // 128, groups, 8, 4, 2, 2)  # (warp, group, i, j, s, pair)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(n, groups)


def factor(packed: Tensor, down: bool) -> Tensor:
    """lora_down (K, R) -> D (R, K); lora_up (N, R) -> U (N, R). Tiles of 16 x 16 as the tensor cores take them."""
    c, r = packed.shape
    tiles = packed.contiguous().view(c // 16, r // 16, 8, 4, 2, 2, 2)  # (.., row of 8, run, which 8, which 4, column)
    tiles = tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(c // 16, r // 16, 16, 16)
    if down:  # its tiles are (rank, channel)
        return tiles.permute(1, 2, 0, 3).reshape(r, c)
    return tiles.permute(0, 2, 1, 3).reshape(c, r)


def _branch(path: Path, name: str, parts: dict[str, Tensor], smooth: Tensor | None, n: int, k: int) -> dict:
    """The contract's branch sees x / smooth, nunchaku's sees x: D is multiplied by smooth."""
    down, up = parts.get("down"), parts.get("up")
    if down is None and up is None:
        return {}
    shapes = [tuple(t.shape) if t is not None else None for t in (down, up)]
    rank = shapes[1][-1] if shapes[1] else 0
    floats = all(t is None or t.is_floating_point() for t in (down, up))
    good = floats and shapes == [(k, rank), (n, rank)] and rank % 16 == 0
    _need(path, name, good, f"low-rank factors are {shapes}")
    if rank == 0:
        return {}
    d = factor(down, down=True).float()
    return {"down": d if smooth is None else d * smooth, "up": factor(up, down=False).float()}


def _modulation(path: Path, name: str, parts: dict[str, Tensor]) -> Unpacked:
    """W4A16: qweight (N/4, K/2) int32, W = code * wscales + wzeros."""
    q, scale, zero, bias = parts["qweight"], parts.get("wscales"), parts.get("wzeros"), parts.get("bias")
    _need(path, name, q.ndim == 2 and q.numel() > 0 and q.shape[1] % 32 == 0, f"qweight is {tuple(q.shape)}")
    n, k = 4 * q.shape[0], 2 * q.shape[1]
    for what, t in (("wscales", scale), ("wzeros", zero)):
        good = t is not None and t.ndim == 2 and t.shape[0] >= k // GROUP and t.shape[1] == n and t.is_floating_point()
        _need(path, name, good, f"{what} is {None if t is None else tuple(t.shape)}, not {(k // GROUP, n)}")
    _need(path, name, bias is None or tuple(bias.shape) == (n,), "its bias does not fit")
    splits = n // k
    _need(path, name, n == splits * k and splits in (3, 6), f"{n} x {k} is no modulation of 3 or 6 parts")
    scale, zero = scale[: k // GROUP].float(), zero[: k // GROUP].float()
    weight = QuantizedWeight(pack_nibbles(modulation_codes(q)), scale, zero + 8 * scale, (n, k))
    rows = torch.arange(n).view(k, splits).t().flatten()  # part j's row i stands at i * splits + j
    if bias is not None:
        bias = bias.float()[rows].view(splits, k)
        for part in {1, splits - 2}:  # shift, scale, gate (, shift, scale, gate)
            bias[part] -= 1
        bias = bias.flatten()
    return Unpacked(take(weight, rows), bias)


def modulation_codes(q: Tensor) -> Tensor:
    """(N/4, K/2) int32 -> codes (N, K). Four rows take turns every 64 columns; 32 columns are 8 int16 of 4 nibbles."""
    n, k = 4 * q.shape[0], 2 * q.shape[1]
    words = q.contiguous().view(torch.int16).view(n // 4, k // 64, 4, 2, 8)  # (.., row, half, word)
    nibbles = (words.unsqueeze(-2).int() >> torch.tensor([0, 4, 8, 12]).view(4, 1)) & 15  # (.., nibble, word)
    return nibbles.permute(0, 2, 1, 3, 4, 5).reshape(n, k).to(torch.uint8)


# ------------------------------------------------------------------------------------------- layers of layers


def split_rows(layer: Unpacked, parts: int) -> list[Unpacked]:
    """A fused q, k, v -> its parts, all with the one branch's D."""
    pieces = torch.arange(layer.weight.shape[0]).chunk(parts)
    return [Unpacked(take(layer.weight, p), None if layer.bias is None else layer.bias[p]) for p in pieces]


def stack_rows(a: Unpacked, b: Unpacked) -> Unpacked | None:
    """Two layers of one input -> one of both outputs; None where they are not smoothed alike."""
    weight = stack([a.weight, b.weight])
    return weight and Unpacked(weight, None if a.bias is None else torch.cat([a.bias.float(), b.bias.float()]))


def stack_columns(a: Unpacked, b: Unpacked) -> Unpacked:
    """Two layers whose outputs are added -> one of both inputs."""
    w, v = a.weight, b.weight
    ones = [torch.ones(m.shape[1]) if m.pre_quant_scale is None else m.pre_quant_scale for m in (w, v)]
    smoothed = w.pre_quant_scale is not None or v.pre_quant_scale is not None
    weight = QuantizedWeight(
        torch.cat([w.codes, v.codes], 1),
        torch.cat([w.scale, v.scale]),
        None,
        (w.shape[0], w.shape[1] + v.shape[1]),
        pre_quant_scale=torch.cat(ones) if smoothed else None,
        **({} if w.up is None else {"down": torch.block_diag(w.down, v.down), "up": torch.cat([w.up, v.up], 1)}),
    )
    return Unpacked(weight, None if a.bias is None else a.bias.float() + b.bias.float())


def _need(path: Path, name: str, ok: bool, problem: str) -> None:
    if not ok:
        raise CheckpointError(f"{path}: nunchaku layer {name}: {problem}. Download the file again.")
