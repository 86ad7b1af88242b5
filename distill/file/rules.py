"""Rules that a value in a file's metadata keeps: functions of (where, value) that raise Wrong. See `schema`."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[str, Any], None]
LEVELS = 16
"""More levels than any network has."""


class Wrong(ValueError):
    """A value that cannot be right: where it is ("schedule.shift"), and what is wrong with it."""

    def __init__(self, where: str, problem: str):
        super().__init__(f"metadata {where!r} {problem}")


def need(ok: bool, where: str, value: Any, expected: str) -> None:
    """Raise Wrong where a value is not ok."""
    if not ok:
        raise Wrong(where, f"is {reprlib.repr(value)}, not {expected}")


# --------------------------------------------------------------------------------------------------------- rules


def whole(low: int, high: int) -> Rule:
    """A whole number in that range."""
    return lambda where, v: need(type(v) is int and low <= v <= high, where, v, f"a whole number from {low} to {high}")


def number(low: float, high: float) -> Rule:
    """A finite number in that range."""
    return lambda where, v: need(
        type(v) in (int, float) and low <= v <= high, where, v, f"a number from {low:g} to {high:g}"
    )


def text(longest: int = 1000) -> Rule:
    """A string."""
    return lambda where, v: need(
        isinstance(v, str) and len(v) <= longest, where, v, f"a text of at most {longest} characters"
    )


def one_of(*values: Any) -> Rule:
    """One of these, of the same type."""
    known = {(type(v), v) for v in values}
    return lambda where, v: need(
        isinstance(v, str | int | float | None) and (type(v), v) in known, where, v, f"one of {values}"
    )


def maybe(rule: Rule) -> Rule:
    """The rule, or null."""
    return lambda where, v: None if v is None else rule(where, v)


def every(rule: Rule, most: int, least: int = 1) -> Rule:
    """A list of values that each keep the rule."""

    def check(where: str, v: Any) -> None:
        fits = isinstance(v, list | tuple) and least <= len(v) <= most
        need(fits, where, v, f"a list of {least} to {most}" if least < most else f"a list of {most}")
        for i, one in enumerate(v):
            rule(f"{where}[{i}]", one)

    return check


def per_level(rule: Rule) -> Rule:
    """One value for all levels of a network, or a list with one for each."""
    many = every(rule, LEVELS)
    return lambda where, v: many(where, v) if isinstance(v, list | tuple) else rule(where, v)


def table(rules: Mapping[str, Rule], needed: tuple[str, ...] = (), others: Rule | None = None) -> Rule:
    """An object; others: the rule of keys that are not in `rules`, None where there may be none."""

    def check(where: str, v: Any) -> None:
        need(isinstance(v, Mapping), where, v, "an object")
        for key in needed:
            if key not in v:
                raise Wrong(f"{where}.{key}", "is missing")
        for key, one in v.items():
            need(isinstance(key, str), where, key, "a text for a key")
            if (rule := rules.get(key, others)) is None:
                raise Wrong(f"{where}.{reprlib.repr(key)[1:-1]}", f"is unknown; known are {', '.join(rules)}")
            rule(f"{where}.{reprlib.repr(key)[1:-1]}", one)

    return check


def anything(where: str, v: Any) -> None:
    """Any JSON."""


def setting(where: str, v: Any) -> None:
    """What a network's configuration may hold under a key without a rule of its own. Libraries load code from the
    network for some implementations of attention, so that a file may not name one."""
    named = where.rpartition(".")[2]
    if named.startswith("_") or "implementation" in named or named == "auto_map":
        raise Wrong(where, "chooses code, which a file may not")
    if isinstance(v, Mapping):
        need(where.count(".") < 6, where, v, "a flat object")
        SETTINGS(where, v)
    elif isinstance(v, list | tuple):
        every(setting, 4096, 0)(where, v)
    else:
        ok = v is None or isinstance(v, bool) or (isinstance(v, str) and len(v) <= 1000)
        need(ok or (type(v) in (int, float) and abs(v) <= 1 << 31), where, v, "a value of a configuration")


OBJECT = table({}, others=anything)
SETTINGS = table({}, others=setting)
"""A network's configuration of which nothing is known here."""
