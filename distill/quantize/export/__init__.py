"""Quantized models for loaders that lack OneStep: `write("model.gguf", weights, metadata, "gguf:Q4_0")`."""

from __future__ import annotations

from .base import Written, write

__all__ = ["Written", "write"]
