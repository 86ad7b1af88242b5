"""One file per method. A new one is a file here, a line in METHODS, and a test."""

from __future__ import annotations

from .regression import RegressionOptions
from .sds import SDSOptions
from .vsd import VSDOptions

METHODS = {"vsd": VSDOptions, "sds": SDSOptions, "regression": RegressionOptions}
"""By name on the command line and in metadata."""
