"""GGUF as ComfyUI-GGUF reads it, quantized by the gguf package (which knows no K-quants; llama.cpp makes those).

ggml cuts a tensor into blocks along its last side, which must hold whole ones; a 3x3 convolution's does not. Such a
tensor is stored as rows of 256 in the same order, with its true shape in `comfy.gguf.orig_shape.*`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...atomic import write_beside
from ...header import CheckpointError
from ...packed.formats.gguf import ORIGINAL
from ...packed.formats.gguf_names import to_llama_cpp
from ..options import Progress
from ..source import relative
from .base import Written, is_matrix, quantizable

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16")
ROW = 256
LONGEST = 127
"""characters of a name that ggml holds"""
ARCHITECTURES = (
    ("flux", ("double_blocks.0.img_attn.proj.weight",)),
    ("hyvid", ("double_blocks.0.img_attn_proj.weight",)),
    ("sd3", ("joint_blocks.0.context_block.attn.qkv.weight",)),
    ("aura", ("double_layers.3.modX.1.weight",)),
    ("hidream", ("double_stream_blocks.0.block.adaLN_modulation.1.weight",)),
    ("wan", ("blocks.0.self_attn.norm_q.weight", "head.modulation")),
    ("ltxv", ("adaln_single.emb.timestep_embedder.linear_2.weight", "transformer_blocks.0.scale_shift_table")),
    ("lumina2", ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight")),
    ("qwen_image", ("transformer_blocks.0.img_mod.1.weight",)),
    ("cosmos", ("blocks.0.mlp.layer1.weight",)),
    ("sdxl", ("label_emb.0.0.weight", "input_blocks.0.0.weight")),
    ("sd1", ("input_blocks.0.0.weight",)),
    ("t5encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
)
"""ComfyUI-GGUF's `general.architecture` -> keys that only such a model has"""


def write(
    path: Path,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    kind: str,
    only: Collection[str] | None,
    progress: Progress | None,
) -> Written:
    """As `export.write`, in one of TYPES."""
    gguf = _package(path, kind)
    keys, prefix = quantizable(weights, only)
    whole = "onestep.version" in metadata  # a OneStep file stays one: its VAE, text encoder and prefixes too
    architecture = architecture_of(path, {k.removeprefix(prefix) for k in weights})
    writer = _begun(gguf, architecture, metadata)
    wanted, done = set(keys), Written(path)
    for i, key in enumerate(weights):
        if progress:
            progress(i, len(weights), "quantizing")
        if not key.startswith(prefix) and not whole:
            done.left_out.append(key)
            continue
        if architecture == "t5encoder" and key == "encoder.embed_tokens.weight" and "shared.weight" in weights:
            continue  # one table under two names
        name = _name(path, key if whole else key.removeprefix(prefix), architecture)
        t, layer = weights[key], key.removesuffix(".weight")
        fits = key in wanted and is_matrix(key, t) and t.numel() % ROW == 0 and kind not in ("F16", "BF16")
        error = _add(gguf, writer, name, t, kind, fits)
        if fits:
            done.layers[layer] = error
        elif is_matrix(key, t) and key.startswith(prefix):
            done.dense[layer] = "not chosen" if key not in wanted else f"{t.numel()} numbers are no multiple of {ROW}"

    def save(temporary: Path) -> None:
        writer.write_header_to_file(path=temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, save)
    return done


def _package(path: Path, kind: str) -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ImportError("format gguf needs the gguf package: pip install gguf") from None
    if kind not in TYPES:
        raise CheckpointError(
            f"{path}: the gguf package cannot quantize to {kind!r}. Choose one of {', '.join(TYPES)}."
        )
    return gguf


def _begun(gguf: ModuleType, architecture: str, metadata: Mapping[str, str]) -> Any:
    """A writer with everything but tensors."""
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in metadata.items():
        if not name.startswith("general."):
            writer.add_string(name, value)
    return writer


def _name(path: Path, key: str, architecture: str) -> str:
    name = to_llama_cpp(key) if architecture == "t5encoder" else key
    if len(name) > LONGEST:
        raise CheckpointError(f"{path}: ggml holds names of {LONGEST} characters, not {name!r}. Choose another format.")
    return name


def _add(gguf: ModuleType, writer: Any, name: str, t: Tensor, kind: str, quantize: bool) -> float:
    """One tensor into the file; its relative error, 0 where it stays dense."""
    array, type_ = (_quantized if quantize else _dense)(gguf, t, kind)
    error = 0.0
    if quantize:
        error = relative(torch.from_numpy(gguf.dequantize(array, type_)).view(t.shape), t.float())
    array, shape = _folded(array, type_, tuple(t.shape), gguf)
    if shape:
        writer.add_array(ORIGINAL + name, list(shape))
    writer.add_tensor(name, array, raw_dtype=type_)
    return error


def architecture_of(path: Path, keys: Collection[str]) -> str:
    """The name that ComfyUI-GGUF knows a model by. Raises CheckpointError for one it does not."""
    for name, needed in ARCHITECTURES:
        if all(k in keys for k in needed):
            return name
    known = ", ".join(name for name, _ in ARCHITECTURES)
    raise CheckpointError(f"{path}: ComfyUI-GGUF has no name for this model; it reads {known}. Choose another format.")


def _quantized(gguf: ModuleType, t: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """(raw blocks (rows, bytes), their GGML type). Rows as long as they may be: the package loops over them."""
    type_, w = gguf.GGMLQuantizationType[kind], t.float()
    rows = w.reshape(w.shape[0], -1)
    if rows.shape[1] % 32:
        rows = w.reshape(-1, ROW)
    return gguf.quantize(np.ascontiguousarray(rows.numpy()), type_), type_


def _dense(gguf: ModuleType, t: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """(array, its GGML type): vectors and large numbers as F32, the rest in 16 bits; integers as they are."""
    types = gguf.GGMLQuantizationType
    if not t.is_floating_point():
        widths = {torch.int8: types.I8, torch.int16: types.I16, torch.int32: types.I32, torch.int64: types.I64}
        if t.dtype in widths:
            return np.ascontiguousarray(t.numpy()), widths[t.dtype]
        return t.to(torch.int32).numpy(), types.I32
    t = t.contiguous()
    if t.ndim < 2:
        return t.float().numpy(), types.F32
    if t.dtype == torch.bfloat16 or kind == "BF16":
        return t.bfloat16().view(torch.int16).numpy(), types.BF16
    if t.float().abs().max() > 65504:
        return t.float().numpy(), types.F32
    return t.half().numpy(), types.F16


def _folded(array: np.ndarray, type_: Any, shape: tuple[int, ...], gguf: ModuleType) -> tuple[np.ndarray, tuple]:
    """(array as gguf wants it, the true shape where the array's is another)."""
    block, nbytes = gguf.GGML_QUANT_SIZES[type_]
    if type_ == gguf.GGMLQuantizationType.BF16:
        array, block = array.reshape(shape).view(np.uint8), 1
    if block == 1:
        return (array, ()) if len(shape) <= 4 else (array.reshape(shape[0], -1), shape)
    if len(shape) == 2 and shape[1] % block == 0:
        return array.reshape(shape[0], -1), ()
    return array.reshape(-1, ROW // block * nbytes), shape
