"""Stable Diffusion XL: a U-Net, two text encoders, pooled text, and the picture's size as a condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..layouts import Weights, text_to_ldm, text_to_openclip
from .base import Backbone
from .ldm import checkpoint_weights


class SDXL(Backbone):
    """Conditions: {"encoder_hidden_states": (B, L, D1 + D2), "text_embeds": (B, P)}. The size that the net is told is
    that of the picture it makes, uncropped."""

    main = "unet"

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """As diffusers' pipeline encodes them; the null prompt is zeros where the pipeline's configuration says so."""
        self.need_parts("text_encoder", "text_encoder_2")
        words, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=self.device)
            words, pooled = words.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"encoder_hidden_states": words, "text_embeds": pooled}

    def call(self, net: nn.Module, x: Tensor, index: Tensor, cond: Cond) -> Tensor:
        """As diffusers' pipeline calls it."""
        h, w = (side * self.meta.latent["factor"] for side in x.shape[-2:])
        size = torch.tensor([[h, w, 0, 0, h, w]], dtype=x.dtype, device=x.device).expand(len(x), -1)
        added = {"text_embeds": cond["text_embeds"], "time_ids": size}
        words = cond["encoder_hidden_states"]
        return net(x, index, encoder_hidden_states=words, added_cond_kwargs=added, return_dict=False)[0]

    def comfy_weights(self, net: nn.Module) -> Weights:
        """As Stability's own file holds them; an empty tensor's name says v prediction."""
        self.need_parts("text_encoder", "text_encoder_2")
        first, second = (dict(self.parts[name].state_dict()) for name in ("text_encoder", "text_encoder_2"))
        texts = {f"conditioner.embedders.0.transformer.{k}": v for k, v in text_to_ldm(first).items()}
        texts |= {f"conditioner.embedders.1.model.{k}": v for k, v in text_to_openclip(second).items()}
        if self.meta.prediction == "v":
            texts["v_pred"] = torch.zeros(0)
        return checkpoint_weights(self, net, texts, ("eps", "v"))

    def feature_layers(self, net: nn.Module) -> list[nn.Module]:
        """Every level on the way down, and the middle."""
        return [*net.down_blocks, net.mid_block]
