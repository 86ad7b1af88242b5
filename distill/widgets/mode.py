"""Whether somebody can press a button, and whether there is time."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def live() -> bool:
    """Whether this is a notebook's kernel with a page in front of it; ONESTEP_STATIC=1 says that there is none."""
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel") and os.environ.get("ONESTEP_STATIC", "0") == "0"


def size(full: T, fast: T) -> T:
    """`full`, or `fast` where ONESTEP_FAST=1 asks for small settings: every chapter in about a minute."""
    return full if os.environ.get("ONESTEP_FAST", "0") == "0" else fast
