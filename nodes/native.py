"""A OneStep file as ComfyUI's own MODEL, CLIP and VAE, built from the file's metadata alone.

The weights go into ComfyUI's UNetModel, CLIPTextModel and AutoencoderKL, so that samplers, LoRA, ControlNet, FreeU and
the memory management treat them like any other model. Each function raises CheckpointError, naming the file and the
cure, where ComfyUI's classes cannot hold the architecture or the weights do not fill it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from ..distill.autoencoder import PatchAutoencoder
from ..distill.checkpoint import CheckpointError, Metadata, Weights, check_fit, is_patch
from ..distill.layouts import per_level
from .recipe import attach

MODEL_TYPES = {
    "x0": comfy.model_base.ModelType.EPS,  # ModelType has no x0: Model replaces its model_sampling
    "eps": comfy.model_base.ModelType.EPS,
    "v": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
}
DENOISERS = {
    "x0": comfy.model_sampling.X0,
    "eps": comfy.model_sampling.EPS,
    "v": comfy.model_sampling.V_PREDICTION,
}
# What UNetModel computes without an option for anything else: diffusers' key -> the values that mean the same.
FIXED_UNET = {
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "act_fn": ("silu",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_scale_factor": (1, 1.0),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "dual_cross_attention": (False,),
    "only_cross_attention": (False,),
    "upcast_attention": (False, None),
    "class_embed_type": (None, "projection"),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "time_embedding_type": ("positional",),
    "time_cond_proj_dim": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
FIXED_VAE = {"norm_num_groups": (32,), "act_fn": ("silu",), "mid_block_add_attention": (True,)}
FIXED_TEXT = {"layer_norm_eps": (1e-5,), "hidden_act": tuple(comfy.clip_model.ACTIVATIONS)}


def require(path: Path, what: str, config: dict, fixed: dict[str, tuple]) -> None:
    """Raise CheckpointError where a configuration asks for what ComfyUI's class cannot compute."""
    for key, allowed in fixed.items():
        if config.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{path}: wrong architecture: ComfyUI's {what} needs {key} = {expected}, the file has {config[key]!r}. "
                "Train with that setting, or run the file with `distill sample`."
            )


def require_multiples(path: Path, what: str, channels: list[int]) -> None:
    if any(c % channels[0] for c in channels):
        need = f"needs channels that are multiples of the first, the file has {list(channels)}"
        raise CheckpointError(f"{path}: wrong architecture: ComfyUI's {what} {need}. Train with such channels.")


# ------------------------------------------------------------------------------------------------ MODEL


class Latent(comfy.latent_formats.LatentFormat):
    """The file's latent space: what previews and EmptyLatentImage need to know of it."""

    def __init__(self, latent: dict):
        self.latent_channels = latent["channels"]
        self.scale_factor, self.shift_factor = latent.get("scale", 1.0), latent.get("shift", 0.0)
        self.spacial_downscale_ratio = latent.get("factor", 8)
        self.latent_rgb_factors = latent.get("rgb_factors")
        self.latent_rgb_factors_bias = latent.get("rgb_bias")

    def process_in(self, latent):
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent):
        return latent / self.scale_factor + self.shift_factor


class Config(comfy.supported_models_base.BASE):
    unet_extra_config = {}  # BASE's default head size must not override the file's
    memory_usage_factor = 1.0

    def __init__(self, path: Path, meta: Metadata):
        super().__init__(unet_config(path, meta.architecture["unet"]))
        self.latent_format = Latent(meta.latent)
        self.prediction = meta.prediction
        schedule = meta.schedule
        self.sampling_settings = {
            "beta_schedule": "linear",  # ComfyUI's "linear" is diffusers' "scaled_linear"
            "linear_start": schedule.get("beta_start", 0.00085),
            "linear_end": schedule.get("beta_end", 0.012),
            "timesteps": schedule.get("num_train_timesteps", 1000),
            "multiplier": schedule.get("num_train_timesteps", 1000),
            "shift": schedule.get("shift", 1.0),
        }


class ShiftedDiscrete(comfy.model_sampling.ModelSamplingDiscrete):
    """A DDPM schedule with sigma / alpha multiplied by `shift`."""

    def __init__(self, model_config):
        super().__init__(model_config)
        self.set_sigmas(self.sigmas * model_config.sampling_settings["shift"])


class Model(comfy.model_base.BaseModel):
    def __init__(self, config: Config, device):
        super().__init__(config, MODEL_TYPES[config.prediction], device=device)
        if config.prediction != "flow":
            sampling = type("ModelSampling", (ShiftedDiscrete, DENOISERS[config.prediction]), {})
            self.model_sampling = sampling(config)

    def encode_adm(self, **kwargs):
        """Pooled text, for nets that take it beside cross-attention."""
        if not self.adm_channels:
            return None
        pooled = kwargs.get("pooled_output")
        if pooled is None or pooled.shape[-1] != self.adm_channels:
            found = "none" if pooled is None else f"{pooled.shape[-1]} numbers"
            raise ValueError(
                f"The prompt has the wrong pooled text: {found}, where this MODEL takes {self.adm_channels}. "
                "Encode it with the CLIP of the same OneStep Load Student node."
            )
        return pooled


def unet_config(path: Path, config: dict) -> dict:
    """UNet2DConditionModel's configuration -> the arguments of ComfyUI's UNetModel."""
    require(path, "U-Net", config, FIXED_UNET)
    channels, down, up = config["block_out_channels"], config["down_block_types"], config["up_block_types"]
    require_multiples(path, "U-Net", channels)
    layers = per_level(config.get("layers_per_block", 2), len(down))
    depth = per_level(config.get("transformer_layers_per_block", 1), len(down))
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)  # diffusers: both count heads
    head_size = -1
    if isinstance(heads, list | tuple):
        sizes = {c // h for c, h, kind in zip(channels, heads, down, strict=True) if "CrossAttn" in kind}
        if len(sizes) > 1:
            raise CheckpointError(
                f"{path}: wrong architecture: ComfyUI's U-Net needs heads of one size, the file has {sorted(sizes)}. "
                "Train with one number of heads, or with one size."
            )
        heads, head_size = -1, sizes.pop()
    pooled = config.get("class_embed_type") == "projection"
    into, out_of = [], []  # transformer blocks per resnet, from the image inwards
    for i in range(len(down)):
        into += [depth[i] if "CrossAttn" in down[i] else 0] * layers[i]
        out_of += [depth[i] if "CrossAttn" in up[-1 - i] else 0] * (layers[i] + 1)
    return {
        "image_size": config.get("sample_size") or 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": layers,
        "transformer_depth": into,
        "transformer_depth_middle": depth[-1],
        "transformer_depth_output": out_of,
        "context_dim": config["cross_attention_dim"],
        "num_heads": heads,
        "num_head_channels": head_size,
        "use_linear_in_transformer": bool(config.get("use_linear_projection")),
        "use_scale_shift_norm": config.get("resnet_time_scale_shift") == "scale_shift",
        "num_classes": "sequential" if pooled else None,
        "adm_in_channels": config["projection_class_embeddings_input_dim"] if pooled else None,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }


def build_model(path: Path, meta: Metadata, weights: Weights):
    """LDM-keyed U-Net weights -> MODEL that carries its recipe."""
    config = Config(path, meta)
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    parameters = comfy.utils.calculate_parameters(weights)
    dtypes = config.supported_inference_dtypes
    dtype = mm.unet_dtype(
        model_params=parameters, supported_dtypes=dtypes, weight_dtype=comfy.utils.weight_dtype(weights)
    )
    config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, load_device, dtypes))
    model = Model(config, mm.unet_inital_load_device(parameters, dtype))
    check_fit(path, "U-Net", model.diffusion_model.state_dict(), weights)
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    attach(patcher, meta)
    return patcher


# ------------------------------------------------------------------------------------------------ VAE


def build_vae(path: Path, config: dict, weights: Weights) -> comfy.sd.VAE:
    """The file's autoencoder -> VAE."""
    return (build_patch_vae if is_patch(config) else build_kl_vae)(path, config, weights)


def build_kl_vae(path: Path, config: dict, weights: Weights) -> comfy.sd.VAE:
    """LDM-keyed AutoencoderKL weights of any depth and width, in ComfyUI's own class."""
    require(path, "VAE", config, FIXED_VAE)
    channels, latent = config["block_out_channels"], config["latent_channels"]
    require_multiples(path, "VAE", channels)
    ddconfig = {
        "double_z": True,
        "z_channels": latent,
        "resolution": 256,
        "in_channels": config.get("in_channels", 3),
        "out_ch": config.get("out_channels", 3),
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config.get("layers_per_block", 1),
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": ddconfig, "embed_dim": latent}
    with torch.device("meta"):
        check_fit(path, "VAE", AutoencoderKL(**params).state_dict(), weights)
    vae = comfy.sd.VAE(sd=weights, config={"params": params})
    vae.latent_channels = latent
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(channels) - 1)
    return vae


def build_patch_vae(path: Path, config: dict, weights: Weights) -> comfy.sd.VAE:
    """The tutorial's autoencoder, which ComfyUI has no class for, behind ComfyUI's VAE."""
    module = PatchAutoencoder.from_config(config)
    check_fit(path, "VAE", module.state_dict(), weights)
    module.load_state_dict(weights)
    return ModuleVAE(module, config["channels"], config["factor"])


class ModuleVAE(comfy.sd.VAE):
    """Any module with encode(images in [-1, 1]) and decode(latents), in ComfyUI's memory management."""

    def __init__(self, module: torch.nn.Module, channels: int, factor: int):
        silence = logging.Filter()
        silence.filter = lambda record: "No VAE weights" not in record.getMessage()
        logging.getLogger().addFilter(silence)
        try:
            super().__init__(sd={})  # every default of the running version; it warns that it finds no weights and stops
        finally:
            logging.getLogger().removeFilter(silence)
        self.latent_channels = channels
        self.downscale_ratio = self.upscale_ratio = factor
        self.device, self.output_device = mm.vae_device(), mm.intermediate_device()
        self.vae_dtype = mm.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model = module.eval().to(self.vae_dtype)
        mm.archive_model_dtypes(module)
        # the static patcher: the dynamic one manages ComfyUI's own layers only
        patcher = comfy.model_patcher.ModelPatcher
        self.patcher = patcher(module, load_device=self.device, offload_device=mm.vae_offload_device())
        self.model_size()


# ------------------------------------------------------------------------------------------------ CLIP


class TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP with the file's own vocabulary (the stock class has CLIP's 49408 words)."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        size = config["vocab_size"], config["hidden_size"]
        self.text_model.embeddings.token_embedding = operations.Embedding(*size, dtype=dtype, device=device)


class Words:
    """The file's tokenizer as SDTokenizer wants it: called like one of transformers'."""

    def __init__(self, tokenizer: dict):
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_str(json.dumps(tokenizer))

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.inner.encode(text).ids}

    def get_vocab(self) -> dict[str, int]:
        return self.inner.get_vocab()

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


def build_clip(path: Path, meta: Metadata, weights: Weights, embeddings: list[str]) -> comfy.sd.CLIP:
    """HF-keyed CLIPTextModel weights -> CLIP; `embeddings` are the folders of textual inversions."""
    config = meta.architecture["text_encoder"]
    require(path, "CLIP", config, FIXED_TEXT)
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["eos_token_id"]}
    words, length = Words(meta.text_encoder["tokenizer"]), meta.text_encoder["max_length"]

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                max_length=length,
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                tokenizer_class=SimpleNamespace(from_pretrained=lambda _: words),
            )

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                max_length=length,
                dtype=dtype,
                textmodel_json_config=dict(config),
                model_class=TextModel,
                special_tokens=special,
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    target = SimpleNamespace(
        params={"clip_model": Encoder},
        clip=comfy.sd1_clip.SD1ClipModel,
        tokenizer=lambda **kwargs: comfy.sd1_clip.SD1Tokenizer(tokenizer=Tokenizer, **kwargs),
    )
    # ComfyUI projects the pooled text although nothing here takes the projection: give it something to compute
    weights = {"text_projection.weight": torch.eye(config["hidden_size"])} | weights
    check_fit(path, "CLIP", TextModel(config, None, "meta", comfy.ops.manual_cast).state_dict(), weights)
    return comfy.sd.CLIP(
        target,
        embedding_directory=embeddings,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
        model_options={"dtype": comfy.utils.weight_dtype(weights)},  # ComfyUI would round to half; it computes in fp32
    )
