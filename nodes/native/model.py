"""U-Net weights and metadata -> MODEL."""

from __future__ import annotations

from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import comfy.utils
import torch

from ...distill.file.checkpoint import check_fit
from ...distill.file.metadata import Metadata
from ...distill.header import CheckpointError
from ...distill.layouts import Weights, per_level
from ...distill.packed.weight import layers as marked
from .limits import require, require_multiples, sound
from .ops import operations
from .packed import pack
from .patcher import Patcher

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
FIXED = {
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


class Latent(comfy.latent_formats.LatentFormat):
    """The file's latent space: what previews and EmptyLatentImage need to know of it."""

    def __init__(self, latent: dict):
        self.latent_channels = latent["channels"]
        self.scale_factor, self.shift_factor = latent["scale"], latent["shift"]
        self.spacial_downscale_ratio = latent["factor"]
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
        require(path, "MODEL", meta.schedule, {"kind": ("ddpm", "flow"), "beta_schedule": ("scaled_linear",)})
        require(path, "MODEL", {"prediction": meta.prediction}, {"prediction": tuple(MODEL_TYPES)})
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
    require(path, "U-Net", config, FIXED)
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
        heads, head_size = -1, sizes.pop() if sizes else channels[-1]
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


def build_model(path: Path, meta: Metadata, weights: Weights, disable_dynamic: bool = False, activations: str = "auto"):
    """LDM-keyed U-Net weights -> MODEL; disable_dynamic: ComfyUI's word for whole loading.

    activations: of quantized layers, see distill.packed.layers.
    """
    config, quantized = Config(path, meta), bool(marked(weights))
    weights = pack(weights) if quantized else weights
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    parameters = comfy.utils.calculate_parameters(weights)
    dtypes = config.supported_inference_dtypes
    dtype = mm.unet_dtype(
        model_params=parameters, supported_dtypes=dtypes, weight_dtype=comfy.utils.weight_dtype(weights)
    )
    cast = mm.unet_manual_cast(dtype, load_device, dtypes)
    config.set_inference_dtype(dtype, cast)
    if quantized:
        config.custom_operations = operations(cast or dtype, activations=activations)
    with sound(path, "U-Net"):
        check_fit(path, "U-Net", Model(config, torch.device("meta")).diffusion_model.state_dict(), weights)
    model = Model(config, mm.unet_inital_load_device(parameters, dtype))
    dense = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = (Patcher if quantized else dense)(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    return patcher
