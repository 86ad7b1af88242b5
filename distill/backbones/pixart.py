"""PixArt-alpha and PixArt-Sigma: a DiT on Stable Diffusion's latents, with T5's words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..layouts import Weights
from . import comfy_names
from .transformer import Transformer

ALPHA, SIGMA = {"latent_scale": 0.18215}, {"latent_scale": 0.13025}


class PixArt(Transformer):
    """Conditions: {"encoder_hidden_states": (B, L, D), "encoder_attention_mask": (B, L)}. What a net of 1024 pixels is
    told of the picture's size follows from x."""

    def encode(self, prompts: list[str]) -> Cond:
        """See the class. Raises CheckpointError where there is no text encoder."""
        embeddings, mask, _, _ = self.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def call(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> Tensor:
        """As diffusers' pipeline calls it. The net says the noise and then its variance, which nobody uses."""
        told = None
        if self.net.use_additional_conditions:
            h, w = (side * self.meta.latent["factor"] for side in x.shape[-2:])
            told = {"resolution": x.new_tensor([[h, w]]), "aspect_ratio": x.new_tensor([[h / w]])}
            told = {k: v.repeat(len(x), 1) for k, v in told.items()}
        out = net(x, timestep=index, **cond, added_cond_kwargs=told, return_dict=False)[0]
        return out[:, : x.shape[1]]

    def comfy_weights(self, net: nn.Module) -> Weights:
        """The transformer alone, as a file in diffusion_models has it. ComfyUI tells the two models apart by what they
        are told, and decodes accordingly."""
        fixed = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8}
        told = self.net.use_additional_conditions
        self.known_to_comfyui("PixArt-alpha" if told else "PixArt-Sigma", **fixed, **(ALPHA if told else SIGMA))
        weights = comfy_names.rename(net.state_dict(), comfy_names.pixart())
        length = 120 if told else 300
        weights["y_embedder.y_embedding"] = torch.zeros(length, net.config.caption_channels)  # used in training alone
        return weights
