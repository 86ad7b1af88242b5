"""Random weights of every kind that there are kernels for."""

from dataclasses import replace

import torch

from distill.packed.weight import QuantizedWeight, pack_nibbles
from distill.quantize.rounding import channelwise, round_to_nearest


def weight(kind: str, *shape: int, group: int = 32, seed: int = 0) -> QuantizedWeight:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(*shape, generator=g)
    n, k = shape[0], dense[0].numel()
    codes = torch.randint(0, 16, (n, k), generator=g)
    scale = torch.rand(k // group, n, generator=g) * 0.1 + 0.02
    if kind == "8 bits":
        return channelwise(dense, int8_activations=True)
    if kind == "8 bits in groups":  # as Q8_0, Q5_1 and Q6_K are held
        int8 = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
        return QuantizedWeight(int8, scale / 16, scale, shape, 8)
    if kind == "codebook":
        return QuantizedWeight(
            pack_nibbles(codes), scale, None, shape, codebook=torch.randn(16, generator=g).sort().values
        )
    if kind == "no zero":  # as Q4_0: scales of any sign
        return QuantizedWeight(pack_nibbles(codes), scale * (codes[:1, ::group].t() % 2 * 2 - 1), None, shape)
    if kind == "flat":  # a convolution of a Q4_0 GGUF
        return replace(weight("no zero", *shape, group=group, seed=seed), flat=True)
    if kind == "3 bits":
        return round_to_nearest(dense, 3, group)
    if kind == "everything":
        w = round_to_nearest(dense, 4, group)
        down, up = torch.randn(3, *shape[1:], generator=g) * 0.2, torch.randn(n, 3, generator=g)
        pre = torch.rand(shape[1], generator=g) + 0.5
        return QuantizedWeight(**(vars(w) | {"down": down.half(), "up": up, "pre_quant_scale": pre.half()}))
    return round_to_nearest(dense, 4, group)


def error(y, expected):
    assert y.shape == expected.shape and y.dtype == expected.dtype
    return ((y - expected).norm() / expected.norm()).item()


def generator(seed: int = 11) -> torch.Generator:
    """For inputs: kernels are held to tight bounds, on the same numbers every time."""
    return torch.Generator().manual_seed(seed)
