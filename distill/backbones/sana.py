"""Sana: linear attention on a deeply compressed latent, a flow, Gemma's words."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..denoiser import Cond, expand, map_cond
from ..header import CheckpointError
from ..layouts import Weights
from .transformer import Transformer


class Sana(Transformer):
    """Conditions: {"encoder_hidden_states": (B, L, D), "encoder_attention_mask": (B, L)}."""

    comfy_loras = False
    stored = torch.bfloat16

    def encode(self, prompts: list[str]) -> Cond:
        """See the class; all prompts but "" follow the instruction that is the default of the pipeline's call. Raises
        CheckpointError where there is no text encoder."""
        asked = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        given, null = self._encode(prompts, asked), self._encode([""], None)
        empty = torch.tensor([p == "" for p in prompts], device=self.device)
        return map_cond(lambda g, n: torch.where(expand(empty, g), n, g), given, null)

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> Cond:
        how = {"do_classifier_free_guidance": False, "complex_human_instruction": instruction}
        embeddings, mask, _, _ = self.encode_prompt(prompts, **how)
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def call(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> Tensor:
        """As diffusers' pipeline calls it."""
        return net(x, timestep=index * self.net.config.timestep_scale, **cond, return_dict=False)[0]

    def comfy_weights(self, net: nn.Module) -> Weights:
        """ComfyUI has no network of this family."""
        raise CheckpointError(f"{self.name}: ComfyUI does not know Sana. Export a diffusers folder.")
