"""What diffusion transformers have in common: prompts through diffusers' own pipelines, features of tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..header import CheckpointError
from . import folder
from .base import Backbone


class Transformer(Backbone):
    """A family whose net is the pipeline's `transformer`. Its models are diffusers folders."""

    main = "transformer"

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.encoders = [name for name in self.parts if name.startswith("text_encoder")]

    @classmethod
    def noise(cls, path: Path, pipe: Any) -> tuple[dict[str, Any], str]:
        """A shift that depends on the size is that of the size the net was trained at."""
        spec, prediction = folder.noise(path, pipe.scheduler.config)
        config = pipe.scheduler.config
        if config.get("use_dynamic_shifting"):
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift

            limits = (config[k] for k in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
            mu = calculate_shift((pipe.default_sample_size // 2) ** 2, *limits)  # tokens are patches of 2x2
            spec["shift"] = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
        return spec, prediction

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], **how: Any) -> tuple:
        """The pipeline's own `encode_prompt`. Raises CheckpointError where a text encoder was freed, or is needed and
        not there."""
        self.need_parts(*(self.encoders or ["text_encoder"]))
        return self.pipeline.encode_prompt(prompts, device=self.device, **how)

    def feature_layers(self, net: nn.Module) -> list[nn.Module]:
        """Every block."""
        return list(net.transformer_blocks)

    def feature(self, x: Tensor, out: Any) -> Tensor:
        """The picture's tokens (B, N, C), where text's come too the latter of two -> (B, C, h, w)."""
        tokens = out[-1] if isinstance(out, tuple) else out
        patch = math.isqrt(x.shape[-2] * x.shape[-1] // tokens.shape[1])
        return tokens.mT.unflatten(2, (x.shape[-2] // patch, x.shape[-1] // patch))

    def known_to_comfyui(self, model: str, **expected: Any) -> None:
        """Raise CheckpointError where the net's configuration, or latent_scale and latent_shift, are not as expected:
        ComfyUI reads some sizes of a model from the weights, and has all else as it is in the published ones."""
        found = {f"latent_{k}": self.meta.latent[k] for k in ("scale", "shift")} | dict(self.net.config)
        for key, value in expected.items():
            have = tuple(found[key]) if isinstance(found[key], list) else found[key]
            if not (math.isclose(have, value, rel_tol=1e-3) if isinstance(value, float) else have == value):
                raise CheckpointError(
                    f"{self.name}: its {key} is {have!r}, but of ComfyUI's {model} {value!r}. Export a folder."
                )
