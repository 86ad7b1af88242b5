"""Arguments are checked where they enter, so that nothing is computed on a wrong one."""

from __future__ import annotations

from typing import Any


def need(ok: bool, name: str, value: Any, rule: str) -> None:
    """Raise ValueError("name is value: rule") where a value is not ok."""
    if not ok:
        raise ValueError(f"{name} is {value!r}: {rule}")
