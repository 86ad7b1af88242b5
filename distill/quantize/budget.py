"""Mixed precision: which layer gets how many bits, so that the sum stays under a budget and the damage is least.

Every layer offers candidates, each with its size and its damage. Damages are taken to add up, as squared errors of
small independent changes do; then the best choice walks along each layer's lower convex hull and buys, again and again,
the step that takes away most damage a bit (the greedy algorithm for the continuous knapsack problem, optimal up to the
last step bought).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..packed.weight import QuantError, group_for


@dataclass(frozen=True)
class Choice:
    """How one layer is stored."""

    bits: int
    """2, 3, 4, 8; 16 is dense"""
    group: int = 0
    """input channels that share a scale; 0: one scale an output channel (8 bits)"""
    rank: int = 0
    """of a low-rank branch"""

    def __str__(self) -> str:
        if self.bits == 16:
            return "dense"
        where = f"groups of {self.group}" if self.group else "one scale a row"
        return f"{self.bits} bits, {where}" + (f", rank {self.rank}" if self.rank else "")


DENSE = Choice(16)


@dataclass(frozen=True)
class Offer:
    """One candidate of one layer."""

    choice: Choice
    size: float
    """bits, all numbers of the layer together"""
    damage: float
    """mean square error it causes, in a unit common to all layers"""


def candidates(channels: int, bits: int = 4) -> list[Choice]:
    """What a layer with so many input channels may become: `bits` in groups of 128, 64, 32; 8 bits; dense."""
    groups = dict.fromkeys(group_for(channels, g) for g in (128, 64, 32))
    return [Choice(bits, g) for g in groups if g] + [Choice(8), DENSE]


def allocate(offers: Mapping[str, list[Offer]], bits: float, numel: int, fixed: float = 0.0) -> dict[str, Offer]:
    """The offer of each layer such that all sizes and `fixed` bits sum to at most `bits` times `numel`, all numbers
    counted. Raises QuantError where even the smallest do not fit."""
    hulls = {layer: hull(some) for layer, some in offers.items()}
    chosen = {layer: 0 for layer in hulls}
    spent, budget = fixed + sum(h[0].size for h in hulls.values()), bits * numel
    if spent > budget:
        least = math.ceil(100 * spent / numel) / 100
        raise QuantError(
            f"a budget of {bits:g} bits a weight is below the {least:.2f} that the smallest choices take; raise it"
        )
    steps = [
        ((h[i].damage - h[i + 1].damage) / (h[i + 1].size - h[i].size), layer, i)
        for layer, h in hulls.items()
        for i in range(len(h) - 1)
    ]
    for _, layer, i in sorted(steps, key=lambda s: (-s[0], s[1], s[2])):
        h = hulls[layer]
        if chosen[layer] == i and spent + h[i + 1].size - h[i].size <= budget:
            spent += h[i + 1].size - h[i].size
            chosen[layer] = i + 1
    return {layer: hulls[layer][i] for layer, i in chosen.items()}


def hull(offers: list[Offer]) -> list[Offer]:
    """Those worth having at some price: growing in size, falling in damage, ever less a bit."""
    out: list[Offer] = []
    for offer in sorted(offers, key=lambda o: (o.size, o.damage)):
        if out and offer.damage >= out[-1].damage:
            continue
        while len(out) > 1 and _slope(out[-2], out[-1]) <= _slope(out[-1], offer):
            out.pop()
        out.append(offer)
    return out


def _slope(a: Offer, b: Offer) -> float:
    return (a.damage - b.damage) / (b.size - a.size)
