"""`distill recipes`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Recipes:
    """Show how public few-step models are called: all of them in a table, or one with its sources."""

    name: tyro.conf.Positional[str] = ""
    """One of them, as the table calls it. Empty: the table."""
    page: bool = False
    """Print docs/recipes.md instead."""


def run(o: Recipes) -> None:
    """Print it. Raises ValueError for a name that is not in the table."""
    from ..recipes import page
    from ..recipes.recipe import recipes

    table = recipes()
    if o.name and o.name not in table:
        raise ValueError(f"{o.name!r} is no recipe; there are {', '.join(table)}")
    if o.page:
        print(page.page(), end="")
    elif o.name:
        print(page.told(table[o.name]))
    else:
        for r in table.values():
            print(f"{r.name:<20} {r.allowed:<8} {r.title}")
