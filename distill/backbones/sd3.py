"""Stable Diffusion 3 and 3.5: MMDiT, a flow, up to three text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..layouts import Weights
from . import comfy_names
from .transformer import Transformer

CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class SD3(Transformer):
    """Conditions: {"encoder_hidden_states": (B, L, D), "pooled_projections": (B, P)}. In the place of a text encoder
    that the folder lacks there are zeros, which the models were trained to take."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        here = [self.parts[name].config.projection_dim for name in CLIPS if name in self.parts]
        left = self.net.config.pooled_projection_dim - sum(here)
        names = (*CLIPS.values(), "tokenizer_3")
        words = next((w for n in names if (w := getattr(self.pipeline, n)) is not None), None)
        for encoder, tokenizer in CLIPS.items():  # diffusers does so for an absent T5
            if encoder not in self.parts:
                setattr(self.pipeline, encoder, Silent(left, self.net.dtype))
                setattr(self.pipeline, tokenizer, words)
                left = 0
        if here:
            self.pipeline.tokenizer_max_length = words.model_max_length

    def encode(self, prompts: list[str]) -> Cond:
        """See the class. Raises CheckpointError where there is no text encoder."""
        how = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
        embeddings, _, pooled, _ = self.encode_prompt(prompts, **how)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def call(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> Tensor:
        """As diffusers' pipeline calls it."""
        return net(x, timestep=index, **cond, return_dict=False)[0]

    def comfy_weights(self, net: nn.Module) -> Weights:
        """The transformer alone, as a file in diffusion_models has it."""
        width = {"num_attention_heads": net.config.num_layers, "attention_head_dim": 64, "in_channels": 16}
        self.known_to_comfyui("SD3", **width, latent_scale=1.5305, latent_shift=0.0609)
        return comfy_names.rename(net.state_dict(), comfy_names.sd3(net.config.num_layers))


class Silent(nn.Module):
    """A CLIP text encoder of some width, 0 included, that says zeros."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, ids: Tensor, output_hidden_states: bool) -> Any:
        """ids (B, L) -> CLIPTextModelWithProjection's output."""
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        states = torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)
        return CLIPTextModelOutput(text_embeds=states[:, 0], hidden_states=(states, states))
