"""The file contract: one safetensors file is the whole model.

Weights lie in the layout of Stable Diffusion's single files (`model.diffusion_model.*`, `first_stage_model.*`,
`cond_stage_model.transformer.*`); metadata holds what else a loader must know, so that no loader carries constants.
ComfyUI's own loaders know networks by their shapes: they find a U-Net of Stable Diffusion's own size in such a file and
call it as that one was, whatever the metadata says; of other sizes, as the tutorial's, they find nothing. Reading needs
torch, safetensors and json only: this module never imports ComfyUI.

    pipeline = from_modules(unet, vae, text_encoder, tokenizer, prediction="x0", schedule=..., t_in=999, latent=...)
    write("student.safetensors", pack(pipeline), dtype=torch.float16)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import layouts
from ..atomic import write_beside
from ..header import CheckpointError
from ..layouts import PREFIXES, Weights
from ..packed import formats
from ..packed.formats import Loaded
from ..packed.weight import layers, narrowed
from .metadata import CURE, Metadata, read_metadata  # noqa: F401  (part of this module's face)


@dataclass(frozen=True)
class Pipeline:
    """A model as diffusers and transformers name its weights. No modules, only tensors."""

    parts: dict[str, Weights]
    """By the names of diffusers' pipelines, as metadata's architecture: unet, vae, text_encoder."""
    meta: Metadata


@dataclass(frozen=True)
class Checkpoint:
    """A model as the file holds it."""

    weights: Weights
    meta: Metadata


# ------------------------------------------------------------------------------------------------ pipeline <-> file


def from_modules(unet, vae=None, text_encoder=None, tokenizer=None, **fields: Any) -> Pipeline:
    """Modules -> Pipeline; `fields` are Metadata's, without architecture and text_encoder, which the modules know."""
    modules = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    architecture: dict[str, Any] = {
        "unet": _plain(unet.config),
        "vae": vae and _plain(vae.config),
        "text_encoder": None,
    }
    tokens = None
    if text_encoder is not None:  # to_diff_dict leaves out what equals transformers' own defaults; loaders need these
        config = text_encoder.config
        architecture["text_encoder"] = _plain(config.to_diff_dict()) | {k: getattr(config, k) for k in TEXT_CONFIG}
    if tokenizer is not None:
        tokens = {
            "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()),
            "max_length": text_encoder.config.max_position_embeddings,
            "start": tokenizer.bos_token_id,
            "end": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
        }
    weights = {k: dict(m.state_dict()) for k, m in modules.items() if m is not None}
    return Pipeline(weights, Metadata(architecture=architecture, text_encoder=tokens, **fields))


TEXT_CONFIG = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _plain(config: Mapping) -> dict[str, Any]:
    """A diffusers or transformers config without the library's own bookkeeping."""
    return {k: v for k, v in dict(config).items() if not k.startswith("_") and k != "transformers_version"}


def pack(pipeline: Pipeline) -> Checkpoint:
    """Diffusers' names -> the file's."""
    configs, weights = pipeline.meta.architecture, {}
    for name, part_weights in pipeline.parts.items():
        prefix, (to_file, _) = PREFIXES[name], layouts.RENAMES[name]
        weights |= {prefix + k: v for k, v in to_file(part_weights, configs[name]).items()}
    return Checkpoint(weights, pipeline.meta)


def part(weights: Weights, prefix: str) -> Weights | None:
    """The weights under one prefix, without it; None where there are none."""
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)} or None


def unpack(checkpoint: Checkpoint) -> Pipeline:
    """The file's names -> diffusers'. Raises KeyError naming a weight that has no place in the architecture."""
    configs, parts = checkpoint.meta.architecture, {}
    for name, prefix in PREFIXES.items():
        if (held := part(checkpoint.weights, prefix)) is not None:
            parts[name] = layouts.RENAMES[name][1](held, configs[name])
    return Pipeline(parts, checkpoint.meta)


def write(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Path:
    """Write a OneStep file, as `store` does. Raises CheckpointError where its metadata cannot be."""
    return store(path, checkpoint.weights, checkpoint.meta.to_strings(), dtype)


def store(path: str | Path, weights: Weights, strings: dict[str, str], dtype: torch.dtype | None = None) -> Path:
    """Write atomically (temporary file, fsync, rename): a reader sees the old file or the new one, never a half.

    dtype: store floating-point weights so (torch.float16 halves the file), but those it cannot hold; None keeps all as
    they are. What belongs to quantized layers stays as it is.
    """
    from safetensors.torch import save_file

    path, stored, quantized = Path(path), {}, set(layers(weights))
    for key, value in weights.items():
        layer, _, name = key.rpartition(".")
        cast = dtype is not None and value.is_floating_point() and (layer not in quantized or name == "bias")
        stored[key] = (narrowed(value.detach(), dtype) if cast else value.detach()).cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda temporary: save_file(stored, temporary, strings))
    return path


def read(path: str | Path, loaded: Loaded | None = None) -> Checkpoint:
    """Read and check a whole file: safetensors, or the GGUF that `distill quantize --format gguf` makes of one.

    loaded: what `packed.formats.read` gave for it already. Raises CheckpointError for what is no sound OneStep file.
    """
    loaded = loaded or formats.read(path)
    meta = Metadata.from_strings(loaded.metadata, path, len(loaded.weights))
    named = {prefix for name, prefix in PREFIXES.items() if meta.architecture.get(name) is not None}
    for prefix in {*PREFIXES.values()}:
        if any(key.startswith(prefix) for key in loaded.weights) != (prefix in named):
            holds = "no weights" if prefix in named else "weights that the metadata's 'architecture' does not name"
            raise CheckpointError(f"{path}: wrong architecture: {holds} under {prefix!r}. {CURE}")
    return Checkpoint(loaded.weights, meta)


# ------------------------------------------------------------------------------------------------ file -> modules


def check_fit(path: str | Path, what: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]):
    """Raise CheckpointError where weights do not fill a module: the architecture in the metadata is another one."""
    cure = f"The metadata's 'architecture' is not that of these weights. {CURE}"
    for name in sorted(expected.keys() ^ found.keys()):
        problem = "lacks" if name in expected else "has no place for"
        raise CheckpointError(f"{path}: wrong architecture: the {what} {problem} {name!r}. {cure}")
    for name, tensor in expected.items():
        if tensor.is_floating_point() and not found[name].is_floating_point():
            raise CheckpointError(f"{path}: the {what}'s {name!r} holds {found[name].dtype}, no weights. {CURE}")
        if tensor.shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)} where {tuple(tensor.shape)} is expected"
            raise CheckpointError(f"{path}: wrong architecture: the {what}'s {name!r} is {shapes}. {cure}")
