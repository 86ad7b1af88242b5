"""Quantized models of other makers, read into the contract of `packed.weight`.

    loaded = read("flux1-dev-Q4_K_S.gguf")      # .weights: dense tensors, and layers as QuantizedWeight.to_tensors

Nothing here unpickles, and no count in a file is believed before it is checked against the file's bytes.
"""

from __future__ import annotations

from .reading import Loaded, check, read

__all__ = ["Loaded", "check", "read"]
