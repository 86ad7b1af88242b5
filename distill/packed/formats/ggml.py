"""ggml's blocks as codes and scales: what the numbers of a GGUF tensor are, without ever making them floats.

A tensor is a row of blocks of 32 or 256 numbers. Each decoder takes the blocks' bytes, (B, bytes), and returns Groups:
integer codes in the order of the dense tensor, and a scale (and zero) for every G of them, with which

    4 bits  W = (code - 8) * scale + zero       (codes 0..15)
    8 bits  W = code * scale + zero             (codes -128..127)
    book    W = codebook[code] * scale

is the weight: the same formulas as QuantizedWeight's. Layouts from ggml's own documentation (ggml-common.h: block_q4_0
and so on); scales stay float16 where the product is one, float32 where a 6-bit factor makes it longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """A tensor's numbers as codes with a scale, and perhaps a zero, for every group of them."""

    codes: Tensor
    """(B, block) uint8 of 0..15, or int8 where bits is 8"""
    scale: Tensor
    """(B, block / G)"""
    zero: Tensor | None
    bits: int
    codebook: Tensor | None = None


class Kind(NamedTuple):
    """One ggml type: how many numbers a block has, in how many bytes, and what they mean."""

    name: str
    block: int
    nbytes: int
    dtype: torch.dtype | None = None
    """for plain numbers"""
    decode: Callable[[Tensor], Groups] | None = None


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""ggml's kvalues_iq4nl"""


def _halves(raw: Tensor, start: int) -> Tensor:
    """(B, bytes) -> (B, 1) float16 at byte `start`."""
    return raw[:, start : start + 2].clone().view(torch.float16)


def _shift(raw: Tensor, shifts: tuple[int, ...], mask: int, run: int) -> Tensor:
    """(B, n) -> (B, n * len(shifts)): runs of `run` bytes, each repeated for every shift."""
    parts = raw.reshape(raw.shape[0], -1, 1, run) >> torch.tensor(shifts, dtype=torch.uint8).view(1, 1, -1, 1)
    return (parts & mask).flatten(1)


def _bits32(raw: Tensor) -> Tensor:
    """(B, 4) -> (B, 32): bit i of the 32-bit number."""
    return ((raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def _affine(codes: Tensor, scale: Tensor, least: Tensor) -> Groups:
    """Codes 0..15 counted from `least`: moved to the contract's code 8."""
    scale, least = scale.float(), least.float()
    return Groups(codes, scale, least + 8 * scale, 4)


def q4_0(raw: Tensor) -> Groups:
    """block_q4_0: 32 codes of 4 bits, one scale."""
    return Groups(_shift(raw[:, 2:], (0, 4), 15, 16), _halves(raw, 0), None, 4)


def q4_1(raw: Tensor) -> Groups:
    """block_q4_1: 32 codes of 4 bits, scale and least number."""
    return _affine(_shift(raw[:, 4:], (0, 4), 15, 16), _halves(raw, 0), _halves(raw, 2))


def _q5(raw: Tensor, start: int) -> Tensor:
    return _shift(raw[:, start + 4 :], (0, 4), 15, 16) | (_bits32(raw[:, start : start + 4]) << 4)


def q5_0(raw: Tensor) -> Groups:
    """block_q5_0: 32 codes of 5 bits, one scale."""
    return Groups(_q5(raw, 2).view(torch.int8) - 16, _halves(raw, 0), None, 8)


def q5_1(raw: Tensor) -> Groups:
    """block_q5_1: 32 codes of 5 bits, scale and least number."""
    return Groups(_q5(raw, 4).view(torch.int8), _halves(raw, 0), _halves(raw, 2), 8)


def q8_0(raw: Tensor) -> Groups:
    """block_q8_0: 32 codes of 8 bits, one scale."""
    return Groups(raw[:, 2:].contiguous().view(torch.int8), _halves(raw, 0), None, 8)


def _scales_and_mins(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's twelve bytes -> two (B, 8) of 0..63."""
    d, m, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat([d & 63, (high & 15) | ((d >> 6) << 4)], 1)
    mins = torch.cat([m & 63, (high >> 4) | ((m >> 6) << 4)], 1)
    return scales.float(), mins.float()


def q4_k(raw: Tensor) -> Groups:
    """block_q4_K: 8 groups of 32 codes of 4 bits, 6-bit scales and least numbers."""
    scales, mins = _scales_and_mins(raw[:, 4:16])
    codes = _shift(raw[:, 16:], (0, 4), 15, 32)
    return _affine(codes, _halves(raw, 0).float() * scales, -_halves(raw, 2).float() * mins)


def q5_k(raw: Tensor) -> Groups:
    """block_q5_K: as q4_k, with a fifth bit."""
    scales, mins = _scales_and_mins(raw[:, 4:16])
    high = _shift(raw[:, 16:48], tuple(range(8)), 1, 32)
    codes = _shift(raw[:, 48:], (0, 4), 15, 32) | (high << 4)
    return Groups(codes.view(torch.int8), _halves(raw, 0).float() * scales, -_halves(raw, 2).float() * mins, 8)


def q6_k(raw: Tensor) -> Groups:
    """block_q6_K: 16 groups of 16 codes of 6 bits, 8-bit scales."""
    codes = _shift(raw[:, :128], (0, 4), 15, 64) | (_shift(raw[:, 128:192], (0, 2, 4, 6), 3, 32) << 4)
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return Groups(codes.view(torch.int8) - 32, _halves(raw, 208).float() * scales, None, 8)


def q2_k(raw: Tensor) -> Groups:
    """block_q2_K: 16 groups of 16 codes of 2 bits, 4-bit scales and least numbers."""
    scales, d, least = raw[:, :16], _halves(raw, 80).float(), _halves(raw, 82).float()
    codes = _shift(raw[:, 16:80], (0, 2, 4, 6), 3, 32)
    return _affine(codes, d * (scales & 15).float(), -least * (scales >> 4).float())


def q3_k(raw: Tensor) -> Groups:
    """block_q3_K: 16 groups of 16 codes of 3 bits, 6-bit scales."""
    low, high = _shift(raw[:, 96:104], (0, 4), 15, 8), _shift(raw[:, 104:108], (0, 2, 4, 6), 3, 4)
    scales = (low | (high << 4)).float() - 32
    codes = _shift(raw[:, 32:96], (0, 2, 4, 6), 3, 32) | (_shift(raw[:, :32], tuple(range(8)), 1, 32) << 2)
    return Groups(codes + 4, _halves(raw, 108).float() * scales, None, 4)  # -4..3 where the contract has -8..7


def iq4_nl(raw: Tensor) -> Groups:
    """block_iq4_nl: 32 codes into a fixed book of 16 numbers, one scale."""
    return Groups(_shift(raw[:, 2:], (0, 4), 15, 16), _halves(raw, 0), None, 4, torch.tensor(IQ4, dtype=torch.float16))


def iq4_xs(raw: Tensor) -> Groups:
    """block_iq4_xs: 8 groups of 32 such codes, 6-bit scales."""
    low, high = _shift(raw[:, 4:8], (0, 4), 15, 1), _shift(raw[:, 2:4], (0, 2, 4, 6), 3, 1)
    scales = (low | (high << 4)).float() - 32
    codes = _shift(raw[:, 8:], (0, 4), 15, 16)
    return Groups(codes, _halves(raw, 0).float() * scales, None, 4, torch.tensor(IQ4, dtype=torch.float16))


KINDS = {
    0: Kind("F32", 1, 4, torch.float32),
    1: Kind("F16", 1, 2, torch.float16),
    2: Kind("Q4_0", 32, 18, decode=q4_0),
    3: Kind("Q4_1", 32, 20, decode=q4_1),
    6: Kind("Q5_0", 32, 22, decode=q5_0),
    7: Kind("Q5_1", 32, 24, decode=q5_1),
    8: Kind("Q8_0", 32, 34, decode=q8_0),
    10: Kind("Q2_K", 256, 84, decode=q2_k),
    11: Kind("Q3_K", 256, 110, decode=q3_k),
    12: Kind("Q4_K", 256, 144, decode=q4_k),
    13: Kind("Q5_K", 256, 176, decode=q5_k),
    14: Kind("Q6_K", 256, 210, decode=q6_k),
    20: Kind("IQ4_NL", 32, 18, decode=iq4_nl),
    23: Kind("IQ4_XS", 256, 136, decode=iq4_xs),
    24: Kind("I8", 1, 1, torch.int8),
    25: Kind("I16", 1, 2, torch.int16),
    26: Kind("I32", 1, 4, torch.int32),
    27: Kind("I64", 1, 8, torch.int64),
    28: Kind("F64", 1, 8, torch.float64),
    30: Kind("BF16", 1, 2, torch.bfloat16),
}
"""ggml_type -> what it is; the types of 1 to 3.5 bits with their own lattices are not read"""
