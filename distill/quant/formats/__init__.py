"""Quantized models of other makers: read into the contract of `quant.weight`, and written for others to read.

    loaded = read("flux1-dev-Q4_K_S.gguf")      # .weights: dense tensors, and layers as QuantizedWeight.to_tensors
    write("model.gguf", weights, metadata, "gguf:Q4_0")

Nothing here unpickles, and no count in a file is believed before it is checked against the file's bytes.
"""

from __future__ import annotations

from .reading import Loaded, check, read
from .writing import Written, write

__all__ = ["Loaded", "Written", "check", "read", "write"]
