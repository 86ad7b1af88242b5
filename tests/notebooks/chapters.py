"""The sources of the course, for the tests here."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load_build():
    """notebooks/build.py as a module."""
    spec = importlib.util.spec_from_file_location("notebooks_build", ROOT / "notebooks/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()
SOURCES = build.sources()


def prose(cell) -> str:
    """A text cell without its links' addresses, formulas and code: what is read as words."""
    text = re.sub(r"\]\([^)]*\)", "]", cell.source)
    return re.sub(r"\$\$.*?\$\$|\$[^$]*\$|<[^>]*>", " ", text, flags=re.S)
