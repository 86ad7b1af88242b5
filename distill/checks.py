"""Arguments are checked where they enter, so that nothing is computed on a wrong one."""

from __future__ import annotations

from math import inf
from typing import Any

SEEDS = (-(2**63), 2**64 - 1)
"""What torch's generators take."""


def need(ok: bool, name: str, value: Any, rule: str) -> None:
    """Raise ValueError("name is value: rule") where a value is not ok."""
    if not ok:
        raise ValueError(f"{name} is {value!r}: {rule}")


def within(options: Any, **ranges: tuple[float, float]) -> None:
    """`need` for numbers among an object's fields: name=(least, most), both included; -inf and inf set no bound.

    None, which stands for a default, passes; NaN and infinities never do.
    """
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        bounded = f"{least} or more" if most == inf else f"{least} to {most}"
        rule = "a number" if (least, most) == (-inf, inf) else bounded
        need(value is None or (least <= value <= most and abs(value) < inf), name, value, rule)


def positive(options: Any, *names: str) -> None:
    """`need` for fields that are finite and above 0, or None."""
    for name in names:
        value = getattr(options, name)
        need(value is None or 0 < value < inf, name, value, "above 0")
