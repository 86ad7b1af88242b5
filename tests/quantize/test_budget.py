"""Mixed precision: the budget holds, and no other choice that fits does less damage."""

import itertools
import re

import pytest
import torch

from distill.packed.weight import QuantError
from distill.quantize.budget import DENSE, Choice, Offer, allocate, candidates, hull


def offers(layers: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(layers):
        numel, harm = 100 * (1 + torch.randint(8, (), generator=g).item()), torch.rand((), generator=g).item()
        sizes = [(Choice(4, 128), 4.25), (Choice(4, 64), 4.5), (Choice(4, 32), 5.0), (Choice(8), 8.0)]
        noise = torch.rand(4, generator=g) * 0.3 + 0.85
        found[f"l{i}"] = [Offer(c, b * numel, harm * 4.0**-b * 1000 * n.item()) for (c, b), n in zip(sizes, noise)] + [
            Offer(DENSE, 16.0 * numel, 0.0)
        ]
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [4.3, 5.0, 7.0, 16.0])
def test_the_budget_holds_and_the_choice_is_nearly_the_best(seed, share):
    some = offers(5, seed)
    total = sum(o[-1].size for o in some.values()) / 16
    chosen = allocate(some, share, total)
    assert sum(o.size for o in chosen.values()) <= share * total
    best = min(
        sum(o.damage for o in pick)
        for pick in itertools.product(*some.values())
        if sum(o.size for o in pick) <= share * total
    )
    damage = sum(o.damage for o in chosen.values())
    step = max(o[0].damage for o in some.values())  # greedy may miss the last step that would not fit
    assert best <= damage <= best + step
    if share == 16:
        assert damage == 0


def test_more_bits_never_do_more_damage():
    some = offers(8, 0)
    total = sum(o[-1].size for o in some.values()) / 16
    damages = [sum(o.damage for o in allocate(some, b, total).values()) for b in (4.3, 4.6, 5, 6, 8, 12, 16)]
    assert damages == sorted(damages, reverse=True) and damages[0] > damages[-1] == 0


def test_the_hull_is_convex_and_keeps_the_smallest():
    o = [Offer(Choice(4, g), s, d) for g, s, d in ((128, 4, 10), (64, 5, 9.5), (32, 6, 4), (8, 7, 6), (4, 8, 3.9))]
    kept = hull(o)
    assert [x.size for x in kept] == [4, 6, 8]


def test_a_budget_below_the_least_is_refused_and_the_least_is_accepted():
    """In bits a weight, as the option is; what stays dense counts."""
    some, fixed = offers(3, 0), 16 * 100.0
    total = int(sum(o[-1].size for o in some.values()) / 16) + 100
    with pytest.raises(QuantError, match=r"a budget of 2 bits a weight is below the \d+\.\d\d that") as refused:
        allocate(some, 2, total, fixed)
    least = float(re.search(r"the (\d+\.\d\d)", str(refused.value))[1])
    assert sum(o.size for o in allocate(some, least, total, fixed).values()) + fixed <= least * total
    with pytest.raises(QuantError):
        allocate(some, least - 0.01, total, fixed)


def test_candidates_are_groups_that_divide_the_channels():
    assert [str(c) for c in candidates(320)] == [
        "4 bits, groups of 160", "4 bits, groups of 64", "4 bits, groups of 32", "8 bits, one scale a row", "dense",
    ]  # fmt: skip
    assert [c.group for c in candidates(96) if c.bits == 4] == [96, 32]
