"""Any file with 4-bit weights -> MODEL or CLIP, recognised as ComfyUI recognises dense ones."""

from __future__ import annotations

from pathlib import Path

import comfy.model_detection as detection
import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...distill.header import CheckpointError
from .fuse import convert
from .ops import operations
from .packed import float_dtype, pack
from .patcher import STATIC, Patcher
from .vae import no_vae


def load(
    path: Path, weights: dict[str, Tensor], metadata: dict[str, str], embeddings: list[str], activations: str = "auto"
) -> tuple:
    """A state dict in the contract's form -> (MODEL, CLIP or None, VAE), the last two of a whole checkpoint.

    Raises CheckpointError where ComfyUI does not know the model.
    """
    named = pack(weights)
    config, diffusion = recognise(path, diffusion_part(named), metadata)
    model = build(path, config, diffusion, float_dtype(weights), activations)
    text = config.process_clip_state_dict(dict(named))
    target = config.clip_target(state_dict=named) if text else None
    clip = None
    if target is not None:
        clip = comfy.sd.CLIP(
            target, embeddings, tokenizer_data=text, state_dict=text, **text_options(text, activations)
        )
        Patcher.adopt(clip.patcher)
    prefixes = dict.fromkeys(config.vae_key_prefix, "")
    vae = comfy.utils.state_dict_prefix_replace(dict(named), prefixes, filter_keys=True)
    return model, clip, comfy.sd.VAE(sd=config.process_vae_state_dict(vae)) if vae else no_vae()


def build(path: Path, config, weights: dict[str, Tensor], dtype: torch.dtype, activations: str = "auto") -> Patcher:
    """Weights in ComfyUI's names -> MODEL; dtype: of those in the file that are not quantized."""
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    supported, parameters = list(config.supported_inference_dtypes), comfy.utils.calculate_parameters(weights)
    inference = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=dtype)
    cast = mm.unet_manual_cast(inference, load_device, supported)
    config.set_inference_dtype(inference, cast)
    config.custom_operations = operations(cast or inference, activations=activations)
    model = config.get_model(weights, "")
    try:
        model.load_model_weights(dict(weights), "")
    except (RuntimeError, ValueError, KeyError) as e:  # load_state_dict has a line for each weight of a wrong shape
        lines = [line.strip() for line in str(e).splitlines()]
        raise CheckpointError(f"{path}: wrong weights: {lines[1] if len(lines) > 1 else lines[0]} Get it again.") from e
    return Patcher(model, load_device=load_device, offload_device=offload_device)


def diffusion_part(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a whole checkpoint, what is under its diffusion model's prefix, without the prefix."""
    prefix = detection.unet_prefix_from_state_dict(weights)
    return comfy.utils.state_dict_prefix_replace(dict(weights), {prefix: ""}, filter_keys=True) or dict(weights)


def recognise(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]):
    """Weights in ComfyUI's, Stable Diffusion's or diffusers' names -> (model configuration, weights in ComfyUI's)."""
    config = detection.model_config_from_unet(weights, "", metadata=metadata)
    if config is not None:
        return config, weights
    converted = convert(weights)
    if converted is not None:
        config = detection.model_config_from_unet(converted, "")
    else:
        config = detection.model_config_from_diffusers_unet(weights)
        if config is not None:
            names = comfy.utils.unet_to_diffusers(config.unet_config)
            converted = {names[k]: v for k, v in weights.items() if k in names}
    if config is None:
        some = ", ".join(list(weights)[:3])
        raise CheckpointError(
            f"{path}: ComfyUI does not know this model (its weights are called {some} ...). "
            "Choose a diffusion model; text encoders go into OneStep Load 4-bit CLIP, OneStep files into Load Student."
        )
    return config, converted


def build_text(
    paths: list[Path], states: list[dict[str, Tensor]], kind: str, embeddings: list[str], activations: str = "auto"
) -> comfy.sd.CLIP:
    """State dicts of one text encoder or more -> CLIP; kind: what ComfyUI's CLIPLoader calls type."""
    for path, state in zip(paths, states, strict=True):
        if "transformer.resblocks.0.ln_1.weight" not in state and comfy.sd.detect_te_model(pack(state)) is None:
            raise CheckpointError(f"{path}: not a text encoder that ComfyUI knows. Choose another file.")
    kind = getattr(comfy.sd.CLIPType, kind.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    named = [pack(state) for state in states]
    options = text_options({}, activations)
    del options["parameters"]  # counted inside
    clip = comfy.sd.load_text_encoder_state_dicts(named, embedding_directory=embeddings, clip_type=kind, **options)
    Patcher.adopt(clip.patcher)
    return clip


def text_options(weights: dict[str, Tensor], activations: str) -> dict:
    """How ComfyUI is to make a text encoder."""
    dtype = mm.text_encoder_dtype(mm.text_encoder_device())
    return {
        "parameters": comfy.utils.calculate_parameters(weights),
        "model_options": {"custom_operations": operations(dtype, text=True, activations=activations)},
        **STATIC,
    }
