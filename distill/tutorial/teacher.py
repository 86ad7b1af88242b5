"""Trains the tutorial's teacher: Stable Diffusion's U-Net in small, predicting x0, on latents of fresh renders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..backbones.patch import PatchAutoencoder
from ..denoiser import diffusers_net, from_net
from ..schedule import Schedule, ddpm, expand, rand, randn
from . import autoencoder as autoencoder
from . import shapes
from .fit import fit

CONFIG = dict(
    sample_size=8,
    in_channels=8,
    out_channels=8,
    block_out_channels=(96, 96),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=128,
    attention_head_dim=4,  # diffusers means the number of heads
    resnet_time_scale_shift="scale_shift",
    class_embed_type="projection",  # pooled text, added to the time embedding: learns much faster at this size
    projection_class_embeddings_input_dim=128,
)
SCHEDULE = ddpm(shift=4.0)  # plain backgrounds show through heavy noise: 4 times Stable Diffusion's sigma/alpha
PREDICTION = "x0"
GUIDANCE = 1.5  # best Frechet distance and diversity at full accuracy, of 1, 1.25, 1.5 and 2
NULL_SHARE = 0.1  # of prompts replaced by "", for guidance (Ho & Salimans 2022)

Encode = Callable[[list[str]], dict[str, Tensor]]


def latent_pool(vae: PatchAutoencoder, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n training pictures as attributes (n, 5) and latents (n, 8, 8, 8) in half precision."""
    generator = torch.Generator().manual_seed(seed)
    attributes, latents = [], []
    for _ in range(0, n, 512):
        a = shapes.sample_attributes(512, generator)
        images = shapes.render(a, shapes.sample_style(512, generator))
        attributes.append(a)
        latents.append(autoencoder.encode(vae, images).half())
    return torch.cat(attributes), torch.cat(latents)


def x0_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """The v-prediction loss as a weight on x0, 1 + SNR (Salimans & Ho 2022, section 4), capped at 5 so that the
    almost clean end, which costs little and matters little, does not drown the rest."""
    return (1 + schedule.snr(t)).clamp(max=5)


def train(
    pool: tuple[Tensor, Tensor],
    encode: Encode,
    minutes: float,
    unet: nn.Module | None = None,
    seed: int = 0,
    batch: int = 48,
    lr: float = 1.5e-3,
    every: Callable[[nn.Module, float], None] | None = None,
    every_minutes: float = 10,
    flat: float = 0.5,
) -> UNet2DConditionModel:
    """Train for a time budget on (attributes, latents); returns the EMA. every, every_minutes: as for `fit`."""
    torch.manual_seed(seed)  # the initial weights
    unet = unet or UNet2DConditionModel(**CONFIG)
    denoiser = from_net(diffusers_net(unet), SCHEDULE, PREDICTION)
    attributes, latents = pool

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[rows].float()
        t = rand((batch,), generator)
        x_t = SCHEDULE.noise(x0, t, randn(x0.shape, generator))
        empty = torch.rand(batch, generator=generator) < NULL_SHARE
        prompts = ["" if e else p for p, e in zip(shapes.prompts_for(attributes[rows], generator), empty)]
        error = denoiser(x_t, t, encode(prompts)) - x0
        return (expand(x0_weight(SCHEDULE, t), x0) * error.square()).mean()

    how = {"ema": 0.9995, "every": every, "every_minutes": every_minutes, "flat": flat}
    return fit(unet, loss, minutes, lr, seed, "teacher", **how)
