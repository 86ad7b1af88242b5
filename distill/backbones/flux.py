"""FLUX.1: schnell, and dev, which has guidance in its weights and is told how much of it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Cond
from ..file.metadata import Metadata
from ..layouts import Weights
from . import comfy_names
from .transformer import Transformer


class Flux(Transformer):
    """Conditions: {"encoder_hidden_states": (B, L, D), "pooled_projections": (B, P)}, and dev's "guidance" (B,), as
    metadata's guidance.embedded says, by default that of the pipeline. Guidance by a second call is diffusers'
    true_cfg_scale, by default 1."""

    stored = torch.bfloat16

    @classmethod
    def describe(cls, path: Path, pipe: Any) -> Metadata:
        """What the pipeline's call names guidance_scale is embedded, where the net has a place for it."""
        meta, call = super().describe(path, pipe), inspect.signature(pipe.__call__).parameters
        guidance = meta.guidance | {"scale": call["true_cfg_scale"].default}
        if not pipe.transformer.config.guidance_embeds:
            return replace(meta, guidance=guidance, steps=4)  # schnell's model card: 1 to 4
        return replace(meta, guidance=guidance | {"embedded": call["guidance_scale"].default})

    def shape(self, n: int, size: int | None = None) -> tuple[int, int, int, int]:
        """The net's configuration names no size; the pipeline does."""
        side = self.pipeline.default_sample_size if size is None else size // self.meta.latent["factor"]
        return n, self.meta.latent["channels"], side, side

    def encode(self, prompts: list[str]) -> Cond:
        """See the class. Raises CheckpointError where a text encoder is not there."""
        self.need_parts("text_encoder", "text_encoder_2")
        embeddings, pooled, _ = self.encode_prompt(prompts)
        cond = {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
        if self.net.config.guidance_embeds:
            default = inspect.signature(self.pipeline.__call__).parameters["guidance_scale"].default
            scale = float(self.meta.guidance.get("embedded", default))
            cond["guidance"] = torch.full((len(prompts),), scale, device=self.device)
        return cond

    def call(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> Tensor:
        """As diffusers' pipeline calls it: 2x2 latents are a token, which is told its row and column."""
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        place = torch.zeros(h, w, 3, device=x.device, dtype=x.dtype)
        place[..., 1] += torch.arange(h, device=x.device)[:, None]
        place[..., 2] += torch.arange(w, device=x.device)
        out = net(
            F.pixel_unshuffle(x, 2).flatten(2).mT,  # (B, h w, 4 C)
            timestep=index.to(x.dtype) / self.meta.schedule["num_train_timesteps"],
            img_ids=place.flatten(0, 1),
            txt_ids=place.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
            **cond, return_dict=False,
        )[0]  # fmt: skip
        return F.pixel_shuffle(out.mT.unflatten(2, (h, w)), 2)

    def feature_layers(self, net: nn.Module) -> list[nn.Module]:
        """Every block, those of two streams and those of one."""
        return [*net.transformer_blocks, *net.single_transformer_blocks]

    def comfy_weights(self, net: nn.Module) -> Weights:
        """The transformer alone, as a file in diffusion_models has it."""
        fixed = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "in_channels": 64}
        self.known_to_comfyui("Flux", **fixed, latent_scale=0.3611, latent_shift=0.1159)
        return comfy_names.rename(net.state_dict(), comfy_names.flux())
