"""One door for every file: what it is, is read from its bytes and keys, never from its name."""

from __future__ import annotations

import mmap
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...header import CheckpointError, first_bytes, read_header
from . import bitsandbytes, comfy, gguf, nunchaku_names


@dataclass(frozen=True)
class Loaded:
    """A file's tensors and metadata, in the contract's form."""

    weights: dict[str, Tensor]
    """dense tensors by key, as the file has them (mapped: they cost memory once touched); a quantized layer L as the
    contract's L.weight, L.weight_scale, ..., L.comfy_quant; stock ComfyUI's formats untouched"""
    metadata: dict[str, str]
    kind: str
    """onestep (at least one layer of the contract's formats), comfy_quant (stock formats only), scaled_fp8, gguf, nf4,
    nunchaku, dense"""


def read(path: str | Path, stock_formats: Collection[str] = comfy.STOCK) -> Loaded:
    """Any of the supported files. Raises CheckpointError naming the file, what is wrong with it and the cure.

    stock_formats: comfy_quant formats to let pass for others to load; ours are always read.
    """
    path = Path(path)
    kind = None
    if is_gguf(path):
        weights, metadata = gguf.read(path)
        kind = "gguf"
    else:
        weights, metadata = _safetensors(path)
        if any(bitsandbytes.STATE in k for k in weights):
            weights, kind = bitsandbytes.convert(path, weights), "nf4"
        elif nunchaku_names.is_nunchaku(weights):
            weights, kind = nunchaku_names.convert(path, weights), "nunchaku"
    found = comfy.check(path, weights, metadata, stock_formats)
    return Loaded(weights, metadata, kind or found)


def check(path: str | Path) -> None:
    """What the header alone tells of a file: quick for files of any size. Raises CheckpointError as `read` does."""
    path = Path(path)
    if not is_gguf(path):
        read_header(path)
        return
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        gguf.header(path, data)


def is_gguf(path: Path) -> bool:
    """GGUF, or to be taken for safetensors. Raises CheckpointError for what is clearly neither."""
    return first_bytes(path).startswith(gguf.MAGIC)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:  # checks sizes, types and overlaps before a tensor is made
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        read_header(path)  # says better what is wrong, where it is length or JSON
        said = " ".join(str(e)[:300].split())  # it quotes the file, which may be endless
        raise CheckpointError(f"{path}: damaged: {said}. Download it again.") from None
