"""Stable Diffusion 1.x, and the tutorial's model, one in small: UNet2DConditionModel, CLIP's text model, a VAE.

Diffusers and transformers are imported when a model is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..file import checkpoint, tokens
from ..file.metadata import Metadata
from ..header import CheckpointError
from ..layouts import TEXT, Weights, is_patch, text_to_ldm, text_to_openclip
from ..packed.layers import install
from ..packed.weight import QuantError, layers
from . import folder, ldm
from .base import Backbone
from .patch import PatchAutoencoder
from .skeleton import skeleton

V_BY = ldm.UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""By the spread of this weight ComfyUI tells the two predictions of 2.x."""


class StableDiffusion(Backbone):
    """Conditions: {"encoder_hidden_states": (B, L, D)}, and "class_labels" (B, P) where the net takes pooled text."""

    main = "unet"
    in_comfyui = True

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts; see the class. Raises CheckpointError where there is no text encoder."""
        self.need_parts("text_encoder")
        length = self.tokenizer.model_max_length
        how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        with tokens.no_panic(self.name):
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
    def describe(cls, path: Path, pipe: Any) -> Metadata:
        """A folder's metadata holds its architecture too, so that its students can be OneStep files."""
        fields = folder.describe(path, pipe, *cls.noise(path, pipe))
        parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer)
        return checkpoint.from_modules(*parts, **fields).meta

    # ------------------------------------------------------------------------------------------------- writing

    def build_pipeline(self) -> Any:
        """The tutorial's own autoencoder is none of diffusers'."""
        from diffusers import StableDiffusionPipeline

        if isinstance(self.parts.get("vae"), PatchAutoencoder):
            raise CheckpointError(f"{self.name}: diffusers does not know its autoencoder. Export another format.")
        parts = {name: self.parts.get(name) for name in ("unet", "vae", "text_encoder")}
        without = {name: None for name in (*folder.UNUSED, "scheduler")}
        return StableDiffusionPipeline(**parts, tokenizer=self.tokenizer, **without, requires_safety_checker=False)

    def comfy_weights(self, net: nn.Module) -> Weights:
        """As a OneStep file holds them; of 2.x, whose text encoder is OpenCLIP's, that one in OpenCLIP's names. ComfyUI
        tells v prediction of 2.x by the size of one weight, and of 1.x not at all."""
        self.need_parts("text_encoder")
        text = self.parts["text_encoder"]
        second = text.config.hidden_act == "gelu"
        if second:
            words = ldm.longer(text_to_openclip(dict(text.state_dict())))
            texts, predictions = {f"cond_stage_model.model.{k}": v for k, v in words.items()}, ("eps", "v")
        else:
            texts = {TEXT + k: v for k, v in text_to_ldm(dict(text.state_dict())).items()}
            predictions = ("eps",)
        weights = ldm.checkpoint_weights(self, net, texts, predictions)
        found = weights[V_BY].float().std(correction=0) > 0.09 if V_BY in weights else False
        if second and bool(found) != (self.meta.prediction == "v"):
            taken = f"by {V_BY} ComfyUI's own loader takes it for {'v' if found else 'eps'}"
            raise CheckpointError(f"{self.name}: its prediction is {self.meta.prediction}; {taken}. Export a folder.")
        return weights


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
    """Metadata -> transformers' tokenizer, padding to the text encoder's length."""
    from transformers import PreTrainedTokenizerFast

    inner = tokens.parse(path, meta)
    start, end, pad = map(inner.id_to_token, (*tokens.start_and_end(meta), tokens.padding(meta)))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        model_max_length=meta.text_encoder["max_length"],
    )
