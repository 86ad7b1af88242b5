"""Stable Diffusion 1.x, and the tutorial's model, one in small: UNet2DConditionModel, CLIP's text model, a VAE.

Diffusers and transformers are imported when a model is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..file import checkpoint, tokens
from ..file.metadata import Metadata
from ..header import CheckpointError
from ..layouts import Weights, is_patch
from ..packed.layers import install
from ..packed.weight import QuantError, layers
from .base import Backbone, skeleton
from .patch import PatchAutoencoder

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names -> ours


class StableDiffusion(Backbone):
    """Conditions: {"encoder_hidden_states": (B, L, D)}, and "class_labels" (B, P) where the net takes pooled text."""

    main = "unet"
    in_comfyui = True

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts, padded with the end token; see the class. Raises CheckpointError where there is no text encoder."""
        if "text_encoder" not in self.parts:
            raise CheckpointError(f"{self.name}: holds no text encoder. Export the file with all three parts.")
        length = self.tokenizer.model_max_length
        how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        ids = self.tokenizer(prompts, **how).input_ids.to(self.device)
        with torch.no_grad():
            out = self.parts["text_encoder"](ids)
        cond = {"encoder_hidden_states": out.last_hidden_state}
        if self.net.config.class_embed_type == "projection":
            cond["class_labels"] = out.pooler_output
        return cond

    def call(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> Tensor:
        """As diffusers' pipelines call it."""
        return net(x, index, **cond, return_dict=False)[0]

    def feature_layers(self, net: nn.Module) -> list[nn.Module]:
        """Every level on the way down, and the middle."""
        return [*net.down_blocks, net.mid_block]

    # ------------------------------------------------------------------------------------------------- opening

    @classmethod
    def from_file(
        cls, path: Path, held: checkpoint.Checkpoint, device: str | torch.device, dtype: torch.dtype
    ) -> StableDiffusion:
        """Quantized layers become `packed.layers`' modules, and stay packed."""
        try:
            weights = checkpoint.unpack(held).parts
        except KeyError as e:
            problem = f"no place for the weight {e}"
            raise CheckpointError(f"{path}: wrong architecture: {problem}. {checkpoint.CURE}") from e
        parts = {
            name: fill(path, name, empty(name, held.meta, path), w, dtype).to(device) for name, w in weights.items()
        }
        tokenizer = build_tokenizer(held.meta, path) if "text_encoder" in parts else None
        return cls(parts, tokenizer, held.meta, Path(path).name, device)

    @classmethod
    def from_folder(cls, path: Path, device: str | torch.device, dtype: torch.dtype) -> StableDiffusion:
        """What the file's metadata would say is read from the scheduler's and the VAE's configurations."""
        from diffusers import StableDiffusionPipeline

        try:
            with quiet():
                pipe = StableDiffusionPipeline.from_pretrained(
                    path, safety_checker=None, feature_extractor=None, image_encoder=None,
                    requires_safety_checker=False, torch_dtype=dtype, use_safetensors=True, local_files_only=True,
                )  # fmt: skip
        except (OSError, ValueError, KeyError) as e:
            raise CheckpointError(f"{path}: diffusers cannot open it: {e}") from e
        parts = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
        schedule, config = pipe.scheduler.config, pipe.vae.config
        spec = {k: schedule[k] for k in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
        if schedule["prediction_type"] not in PREDICTIONS:
            raise CheckpointError(f"{path}: prediction_type {schedule['prediction_type']!r} is none of {PREDICTIONS}.")
        meta = checkpoint.from_modules(
            **parts, tokenizer=pipe.tokenizer,
            prediction=PREDICTIONS[schedule["prediction_type"]], schedule={"kind": "ddpm", **spec},
            t_in=spec["num_train_timesteps"] - 1, steps=50, guidance={"scale": 7.5, "baked": False},
            latent={
                "channels": pipe.unet.config.in_channels, "scale": config.scaling_factor,
                "shift": config.get("shift_factor") or 0.0, "factor": 2 ** (len(config.block_out_channels) - 1),
            },
            license="see the teacher's",
        ).meta  # fmt: skip
        return cls({k: m.to(device) for k, m in parts.items()}, pipe.tokenizer, meta, Path(path).name, device)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of diffusers' and transformers' own inside."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    shown = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def empty(part: str, meta: Metadata, path: str | Path) -> nn.Module:
    """One part of a file without its weights. Raises CheckpointError where its class does not take the configuration,
    KeyError for a part this family does not have."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = meta.architecture[part]
    makes = {
        "unet": lambda: UNet2DConditionModel(**config),
        "vae": lambda: PatchAutoencoder.from_config(config) if is_patch(config) else AutoencoderKL(**config),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(**{k: config[k] for k in checkpoint.TEXT_CONFIG if k in config})
        ),
    }
    make = makes[part]
    try:
        return skeleton(make)
    except Exception as e:  # the libraries check their arguments, each in its own way
        problem = f"metadata 'architecture.{part}' is refused: {e}".splitlines()[0].rstrip(".")
        raise CheckpointError(f"{path}: {problem}. {checkpoint.CURE}") from e


def fill(path: Path, what: str, module: nn.Module, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """An empty module with its weights, packed layers as they are. Raises CheckpointError where they do not fit."""
    if what == "text_encoder" and any(k.startswith("text_model.") for k in module.state_dict()):
        weights = {"text_model." + k: v for k, v in weights.items()}  # transformers 4 names them so
    packed = layers(weights)
    try:
        rest = install(module, weights) if packed else weights
    except QuantError as e:
        raise CheckpointError(
            f"{path}: wrong architecture: the {what}'s {str(e).rstrip('.')}. {checkpoint.CURE}"
        ) from None
    own = tuple(f"{name}." for name in packed)
    expected = {k: v for k, v in module.state_dict().items() if not own or not k.startswith(own)}
    checkpoint.check_fit(path, what, expected, rest)
    rest = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rest.items()}
    module.load_state_dict(rest, strict=False, assign=True)
    return nn.Module.to(module, dtype)  # diffusers' own `to` warns of nothing that matters here


def build_tokenizer(meta: Metadata, path: str | Path) -> Any:
    """Metadata -> transformers' tokenizer, padding with the end token to the text encoder's length."""
    from transformers import PreTrainedTokenizerFast

    inner = tokens.parse(path, meta)
    start, end = map(inner.id_to_token, tokens.start_and_end(meta))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        model_max_length=meta.text_encoder["max_length"],
    )
