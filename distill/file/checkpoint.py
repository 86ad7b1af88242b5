"""The file contract: one safetensors file is the whole model.

Weights lie in the layout of Stable Diffusion's single files (`model.diffusion_model.*`, `first_stage_model.*`,
`cond_stage_model.transformer.*`), which stock ComfyUI reads; metadata holds everything else a loader must know, so that
no loader carries constants. Reading needs torch, safetensors and json only: this module never imports ComfyUI, and
`build`, which makes diffusers modules, imports diffusers when it is called.

    pipeline = from_modules(unet, vae, text_encoder, tokenizer, prediction="x0", schedule=..., t_in=999, latent=...)
    write("student.safetensors", pack(pipeline), dtype=torch.float16)
    unet, vae, text_encoder, tokenizer = build("student.safetensors")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..atomic import write_beside
from ..backbones.patch import PatchAutoencoder
from ..header import CheckpointError
from ..packed.layers import install
from ..packed.weight import QuantError, layers
from . import layouts
from .layouts import TEXT, UNET, VAE, Weights, is_patch
from .metadata import Metadata, read_metadata  # noqa: F401  (part of this module's face)


@dataclass(frozen=True)
class Pipeline:
    """A model as diffusers and transformers name its weights. No modules, only tensors."""

    unet: Weights
    vae: Weights | None
    text_encoder: Weights | None
    meta: Metadata


@dataclass(frozen=True)
class Checkpoint:
    """A model as the file holds it."""

    weights: Weights
    meta: Metadata


class Modules(NamedTuple):
    """What `build` returns: diffusers' U-Net and VAE, transformers' text encoder and tokenizer."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any


# ------------------------------------------------------------------------------------------------ pipeline <-> file


def from_modules(unet, vae=None, text_encoder=None, tokenizer=None, **fields: Any) -> Pipeline:
    """Modules -> Pipeline; `fields` are Metadata's, without architecture and text_encoder, which the modules know."""
    tokens = None
    if tokenizer is not None:
        tokens = {
            "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()),
            "max_length": text_encoder.config.max_position_embeddings,
        }
    architecture = {
        "unet": _plain(unet.config),
        "vae": _plain(vae.config) if vae is not None else None,
        "text_encoder": _plain(text_encoder.config.to_diff_dict()) if text_encoder is not None else None,
    }
    if text_encoder is not None:  # to_diff_dict leaves out what equals transformers' own defaults; loaders need these
        for key in TEXT_CONFIG:
            architecture["text_encoder"][key] = getattr(text_encoder.config, key)
    return Pipeline(
        unet=dict(unet.state_dict()),
        vae=dict(vae.state_dict()) if vae is not None else None,
        text_encoder=dict(text_encoder.state_dict()) if text_encoder is not None else None,
        meta=Metadata(architecture=architecture, text_encoder=tokens, **fields),
    )


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
    configs = pipeline.meta.architecture
    weights = {UNET + k: v for k, v in layouts.unet_to_ldm(pipeline.unet, configs["unet"]).items()}
    if pipeline.vae is not None:
        weights |= {VAE + k: v for k, v in layouts.vae_to_ldm(pipeline.vae, configs["vae"]).items()}
    if pipeline.text_encoder is not None:
        weights |= {TEXT + k: v for k, v in layouts.text_to_ldm(pipeline.text_encoder).items()}
    return Checkpoint(weights, pipeline.meta)


def part(weights: Weights, prefix: str) -> Weights | None:
    """The weights under one prefix, without it; None where there are none."""
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)} or None


def unpack(checkpoint: Checkpoint) -> Pipeline:
    """The file's names -> diffusers'. Raises KeyError naming a weight that has no place in the architecture."""
    configs, weights = checkpoint.meta.architecture, checkpoint.weights
    unet, vae, text = part(weights, UNET), part(weights, VAE), part(weights, TEXT)
    return Pipeline(
        unet=layouts.unet_to_diffusers(unet or {}, configs["unet"]),
        vae=layouts.vae_to_diffusers(vae, configs["vae"]) if vae else None,
        text_encoder=layouts.text_to_diffusers(text) if text else None,
        meta=checkpoint.meta,
    )


def write(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Path:
    """Write atomically (temporary file, fsync, rename): a reader sees the old file or the new one, never a half.

    dtype: store floating-point weights so (torch.float16 halves the file); None keeps them as they are. What belongs to
    quantized layers stays as it is.
    """
    from safetensors.torch import save_file

    path = Path(path)
    strings = checkpoint.meta.to_strings()
    weights, quantized = {}, set(layers(checkpoint.weights))
    for key, value in checkpoint.weights.items():
        layer, _, name = key.rpartition(".")
        cast = dtype is not None and value.is_floating_point() and (layer not in quantized or name == "bias")
        weights[key] = value.detach().to("cpu", dtype if cast else value.dtype).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda temporary: save_file(weights, temporary, strings))
    return path


def read(path: str | Path) -> Checkpoint:
    """Read and check a whole file: safetensors, or the GGUF that `distill quantize --format gguf` makes of one. Raises
    CheckpointError for anything that is not a sound OneStep file."""
    from ..packed import formats

    loaded = formats.read(path)
    meta = Metadata.from_strings(loaded.metadata, path)
    if part(loaded.weights, UNET) is None:
        raise CheckpointError(f"{path}: no weights under {UNET!r}. Write the file with distill.file.checkpoint.write.")
    return Checkpoint(loaded.weights, meta)


# ------------------------------------------------------------------------------------------------ file -> modules


def check_fit(path: str | Path, what: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]):
    """Raise CheckpointError where weights do not fill a module: the architecture in the metadata is another one."""
    cure = "The metadata's 'architecture' is not that of these weights: write the file again."
    for name in sorted(expected.keys() ^ found.keys()):
        problem = "lacks" if name in expected else "has no place for"
        raise CheckpointError(f"{path}: wrong architecture: the {what} {problem} {name!r}. {cure}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)} where {tuple(tensor.shape)} is expected"
            raise CheckpointError(f"{path}: wrong architecture: the {what}'s {name!r} is {shapes}. {cure}")


def build(path: str | Path, device: str | torch.device = "cpu") -> Modules:
    """File -> diffusers' and transformers' modules in fp32, eval mode. What the file lacks is None.

    Quantized layers become `quant.layers`' modules, and stay packed.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ..backbones.meta import skeleton

    checkpoint = read(path)
    configs = checkpoint.meta.architecture
    try:
        pipeline = unpack(checkpoint)
    except KeyError as e:
        raise CheckpointError(f"{path}: wrong architecture: no place for the weight {e}. Write the file again.") from e

    def fill(make: Callable[[], Any], what: str, weights: Weights):
        packed = layers(weights)
        if not packed:
            module = make()
            check_fit(path, what, module.state_dict(), weights)
            module.load_state_dict(weights)
            return module.float().eval().to(device)
        module = skeleton(make)
        try:
            rest = install(module, weights)
        except QuantError as e:
            raise CheckpointError(f"{path}: wrong architecture: the {what}'s {e}") from None
        own = tuple(f"{name}." for name in packed)
        check_fit(path, what, {k: v for k, v in module.state_dict().items() if not k.startswith(own)}, rest)
        module.load_state_dict(rest, strict=False, assign=True)
        return module.float().to(device)

    unet = fill(lambda: UNet2DConditionModel(**configs["unet"]), "U-Net", pipeline.unet)
    vae = None
    if pipeline.vae:
        make = PatchAutoencoder.from_config if is_patch(configs["vae"]) else lambda c: AutoencoderKL(**c)
        vae = fill(lambda: make(configs["vae"]), "VAE", pipeline.vae)
    text_encoder = tokenizer = None
    if pipeline.text_encoder:

        def make_text():
            return CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))

        old = any(k.startswith("text_model.") for k in skeleton(make_text).state_dict())  # transformers 4 names them so
        weights = {("text_model." if old else "") + k: v for k, v in pipeline.text_encoder.items()}
        text_encoder = fill(make_text, "text encoder", weights)
        tokenizer = build_tokenizer(checkpoint.meta)
    return Modules(unet, vae, text_encoder, tokenizer)


def build_tokenizer(meta: Metadata):
    """Metadata -> transformers' tokenizer, padding with the end token to the text encoder's length."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(json.dumps(meta.text_encoder["tokenizer"]))
    config = meta.architecture["text_encoder"]
    start, end = (inner.id_to_token(config[k]) for k in ("bos_token_id", "eos_token_id"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        model_max_length=meta.text_encoder["max_length"],
    )
