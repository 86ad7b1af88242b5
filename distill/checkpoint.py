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
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .autoencoder import PatchAutoencoder
from .layouts import (
    TEXT,
    UNET,
    VAE,
    text_to_diffusers,
    text_to_ldm,
    unet_to_diffusers,
    unet_to_ldm,
    vae_to_diffusers,
    vae_to_ldm,
)

VERSION = 1
PREDICTIONS = ("x0", "eps", "v", "flow")
SCHEDULES = ("ddpm", "flow")
ASSETS = Path(__file__).parent / "assets"
Weights = dict[str, torch.Tensor]


class CheckpointError(ValueError):
    """A file that breaks the contract. The first line names the file, the value and the cure."""


@dataclass(frozen=True)
class Metadata:
    """Everything a loader must know besides the weights, parsed. Stored as flat strings, JSON where nested."""

    architecture: dict[str, Any]
    """{"unet": UNet2DConditionModel's config, "vae": AutoencoderKL's or {"type": "patch", ...} for PatchAutoencoder,
    "text_encoder": CLIPTextConfig's}; the last two may be None"""
    prediction: str
    """what the U-Net puts out: x0, eps, v or flow (noise minus image)"""
    schedule: dict[str, Any]
    """what `schedule.from_spec` takes: {"kind": "ddpm" or "flow", "shift": ..., "num_train_timesteps": ..., ...}"""
    t_in: float
    """the timestep the net is first called at, as the net counts them (0 .. num_train_timesteps)"""
    latent: dict[str, Any]
    """{"channels", "scale", "shift", "factor", "rgb_factors", "rgb_bias"}: the net sees (z - shift) * scale; the VAE
    shrinks images by factor; rgb_* turn what the net sees into a rough preview in [-1, 1]"""
    method: str = "teacher"
    """what trained it: teacher, vsd, sds, regression, ..."""
    steps: int = 1
    """recommended number of steps"""
    guidance: dict[str, Any] = field(default_factory=lambda: {"scale": 1.0, "baked": True})
    """scale, and whether it is already in the weights (a student) or to be applied (a teacher)"""
    text_encoder: dict[str, Any] | None = None
    """{"tokenizer": the tokenizers library's JSON, "max_length": tokens}"""
    teacher: str = ""
    license: str = "Apache-2.0"
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """the training options"""
    workflow: dict[str, Any] | None = None
    """a ComfyUI graph; dropping the file on the canvas opens it"""

    def to_strings(self) -> dict[str, str]:
        self.check("this model")
        strings = {"onestep.version": str(VERSION)}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                strings[f.name] = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        return strings

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: str | Path = "this file") -> Metadata:
        """Parse and check. Raises CheckpointError naming `path`, the key and the cure."""
        if "onestep.version" not in strings:
            raise CheckpointError(
                f"{path}: not a OneStep file: its metadata has no 'onestep.version'. "
                "Open ordinary models with ComfyUI's own loaders; make OneStep files with `distill train`."
            )
        version = strings["onestep.version"]
        if not version.isdigit() or int(version) > VERSION:
            raise CheckpointError(f"{path}: written by a newer OneStep (version {version!r}). Update OneStep.")
        values = {}
        for f in fields(cls):
            if f.name not in strings:
                continue
            text = strings[f.name]
            try:
                values[f.name] = text if f.type == "str" else json.loads(text)
            except json.JSONDecodeError as e:
                raise _metadata_error(path, f.name, f"is not JSON ({e})") from None
        missing = [k for k in ("architecture", "prediction", "schedule", "t_in", "latent") if k not in values]
        if missing:
            raise _metadata_error(path, missing[0], "is missing")
        meta = cls(**values)
        meta.check(path)
        return meta

    def check(self, path: str | Path) -> None:
        """Raise CheckpointError where a value cannot be right."""

        def need(ok: bool, key: str, problem: str) -> None:
            if not ok:
                raise _metadata_error(path, key, problem)

        for key in ("architecture", "schedule", "latent", "guidance", "metrics", "config"):
            need(isinstance(getattr(self, key), dict), key, "is not an object")
        for key in ("text_encoder", "workflow"):
            need(isinstance(getattr(self, key), dict | None), key, "is not an object")
        unet = self.architecture.get("unet")
        need(isinstance(unet, dict), "architecture", "has no 'unet'")
        for key in ("in_channels", "block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim"):
            need(key in unet, "architecture", f"has a 'unet' without {key!r}")
        need(self.prediction in PREDICTIONS, "prediction", f"is {self.prediction!r}, not one of {PREDICTIONS}")
        kind, count = self.schedule.get("kind"), self.schedule.get("num_train_timesteps", 1000)
        need(kind in SCHEDULES, "schedule", f"has kind {kind!r}, not one of {SCHEDULES}")
        in_range = isinstance(self.t_in, int | float) and 0 <= self.t_in <= count
        need(in_range, "t_in", f"is {self.t_in!r}, outside 0..{count}")
        need(isinstance(self.steps, int) and self.steps > 0, "steps", f"is {self.steps!r}, not a number of steps")
        channels, expected = self.latent.get("channels"), unet.get("in_channels")
        need(channels == expected, "latent", f"has {channels!r} channels where the U-Net takes {expected!r}")
        text = self.architecture.get("text_encoder")
        if text is not None:
            need(self.text_encoder is not None, "text_encoder", "is missing (the tokenizer)")
            # transformers pools at the highest id, not at the end token, when that token is number 2
            need(text.get("eos_token_id") != 2, "architecture", "has eos_token_id 2: give the end token another id")


def _metadata_error(path: str | Path, key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: metadata {key!r} {problem}. Write the file again with distill.checkpoint.write.")


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
    weights = {UNET + k: v for k, v in unet_to_ldm(pipeline.unet, configs["unet"]).items()}
    if pipeline.vae is not None:
        vae = pipeline.vae if is_patch(configs["vae"]) else vae_to_ldm(pipeline.vae, configs["vae"])
        weights |= {VAE + k: v for k, v in vae.items()}
    if pipeline.text_encoder is not None:
        weights |= {TEXT + k: v for k, v in text_to_ldm(pipeline.text_encoder).items()}
    return Checkpoint(weights, pipeline.meta)


def is_patch(vae_config: Mapping[str, Any]) -> bool:
    """Whether a VAE's config is that of `autoencoder.PatchAutoencoder`, whose names are the file's own."""
    return vae_config.get("type") == "patch"


def part(weights: Weights, prefix: str) -> Weights | None:
    """The weights under one prefix, without it; None where there are none."""
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)} or None


def unpack(checkpoint: Checkpoint) -> Pipeline:
    """The file's names -> diffusers'. Raises KeyError naming a weight that has no place in the architecture."""
    configs, weights = checkpoint.meta.architecture, checkpoint.weights
    unet, vae, text = part(weights, UNET), part(weights, VAE), part(weights, TEXT)
    if vae and not is_patch(configs["vae"]):
        vae = vae_to_diffusers(vae, configs["vae"])
    return Pipeline(
        unet=unet_to_diffusers(unet or {}, configs["unet"]),
        vae=vae,
        text_encoder=text_to_diffusers(text) if text else None,
        meta=checkpoint.meta,
    )


def write(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Path:
    """Write atomically (temporary file, fsync, rename): a reader sees the old file or the new one, never a half.

    dtype: store floating-point weights so (torch.float16 halves the file); None keeps them as they are.
    """
    from safetensors.torch import save_file

    path = Path(path)
    strings = checkpoint.meta.to_strings()
    weights = {}
    for key, value in checkpoint.weights.items():
        value = value.detach().to("cpu", dtype if dtype is not None and value.is_floating_point() else value.dtype)
        weights[key] = value.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(weights, temporary, strings)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(path: str | Path) -> Checkpoint:
    """Read and check a whole file. Raises CheckpointError for anything that is not a sound OneStep file."""
    from safetensors.torch import load_file

    meta = read_metadata(path)
    weights = load_file(path)
    if part(weights, UNET) is None:
        raise CheckpointError(f"{path}: no weights under {UNET!r}. Write the file with distill.checkpoint.write.")
    return Checkpoint(weights, meta)


def read_metadata(path: str | Path) -> Metadata:
    """Metadata from the header alone (no tensors). Raises CheckpointError."""
    return Metadata.from_strings(read_header(path).get("__metadata__", {}), path)


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of any safetensors file, with the file's length checked against it. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Put it there, or choose another file.")
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(9)
        length = int.from_bytes(start[:8], "little")
        if size < 9 or start[8:] != b"{" or length > 100_000_000:  # the format's own limit
            cure = "Convert it to safetensors."
            if start.startswith(b"version "):
                cure = "It is a git-lfs pointer: fetch the real file with `git lfs pull`."
            raise CheckpointError(f"{path}: not a safetensors file. {cure}")
        text = start[8:] + f.read(length - 1)
    if len(text) < length:
        raise CheckpointError(f"{path}: truncated: {size} bytes, and its header alone is longer. Download it again.")
    try:
        header = json.loads(text)
    except ValueError:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON. Download it again.") from None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise CheckpointError(f"{path}: truncated: {size} of {expected} bytes. Download it again.")
    return header


# ------------------------------------------------------------------------------------------------ file -> modules


def check_fit(path: str | Path, what: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]):
    """Raise CheckpointError where weights do not fill a module: the architecture in the metadata is another one."""
    cure = "The metadata's 'architecture' is not that of these weights: write the file again."
    for name in expected.keys() ^ found.keys():
        problem = "lacks" if name in expected else "has no place for"
        raise CheckpointError(f"{path}: wrong architecture: the {what} {problem} {name!r}. {cure}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)} where {tuple(tensor.shape)} is expected"
            raise CheckpointError(f"{path}: wrong architecture: the {what}'s {name!r} is {shapes}. {cure}")


def build(path: str | Path, device: str | torch.device = "cpu") -> Modules:
    """File -> diffusers' and transformers' modules in fp32, eval mode. What the file lacks is None."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    checkpoint = read(path)
    configs = checkpoint.meta.architecture
    try:
        pipeline = unpack(checkpoint)
    except KeyError as e:
        raise CheckpointError(f"{path}: wrong architecture: no place for the weight {e}. Write the file again.") from e

    def fill(module, what: str, weights: Weights):
        check_fit(path, what, module.state_dict(), weights)
        module.load_state_dict(weights)
        return module.float().eval().to(device)

    unet = fill(UNet2DConditionModel(**configs["unet"]), "U-Net", pipeline.unet)
    vae = None
    if pipeline.vae:
        make = PatchAutoencoder.from_config if is_patch(configs["vae"]) else lambda c: AutoencoderKL(**c)
        vae = fill(make(configs["vae"]), "VAE", pipeline.vae)
    text_encoder = tokenizer = None
    if pipeline.text_encoder:
        module = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        old = any(k.startswith("text_model.") for k in module.state_dict())  # transformers 4 names them so
        weights = {("text_model." if old else "") + k: v for k, v in pipeline.text_encoder.items()}
        text_encoder = fill(module, "text encoder", weights)
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


def bundled(name: str) -> Path:
    """Path of a bundled file: student, teacher or judge. Raises CheckpointError where this copy lacks it."""
    path = ASSETS / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: this copy of OneStep lacks it. Get it from the repository, or train your own.")
    return path
