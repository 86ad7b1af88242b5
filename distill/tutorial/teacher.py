"""Trains the tutorial's teacher: Stable Diffusion's U-Net in small, predicting v, on latents of fresh renders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..backbones.patch import PatchAutoencoder
from ..denoiser import Cond, from_net, map_cond
from ..schedule import Schedule, ddpm, expand, rand, randn
from . import shapes
from .fit import fit, half_convolutions

CONFIG: dict[str, Any] = dict(
    sample_size=8,
    in_channels=12,
    out_channels=12,
    block_out_channels=(96, 96),
    layers_per_block=(2, 1),  # at 8x8, where points and corners are placed, a layer costs a twentieth of the step
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=128,
    attention_head_dim=4,  # diffusers means the number of heads
    resnet_time_scale_shift="scale_shift",
    class_embed_type="projection",  # pooled text, added to the time embedding: learns much faster at this size
    projection_class_embeddings_input_dim=128,
)
SCHEDULE = ddpm(shift=4.0)  # plain backgrounds show through heavy noise: 4 times Stable Diffusion's sigma/alpha
PREDICTION = "v"
"""Right at both ends: at the clean one the net need not repeat what it is shown, as for x0; at the noisy one v is -x0,
so that a one-step student need not carry the noise through the net, as for flow."""
GUIDANCE = 1.5  # best Frechet distance and diversity at full accuracy, of 1, 1.25, 1.5 and 2
NULL_SHARE = 0.1  # of prompts replaced by "", for guidance (Ho & Salimans 2022)
LOW = (0.12, 4.0)
"""Half of the times are drawn evenly in log sigma/alpha between these: where shapes get their edges, and where uniform
t spends a fifth of its draws."""
WEIGHT_CAP = 10.0  # on v's weight of x0, 1 + SNR (Salimans & Ho 2022, section 4): the clean end would drown the rest
DECAYS = (0.999, 0.9997)


def latent_pool(vae: PatchAutoencoder, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n training pictures as attributes (n, 5) and latents (n, C, 8, 8) in half precision."""
    generator = torch.Generator().manual_seed(seed)
    attributes, latents = [], []
    with torch.no_grad(), half_convolutions():
        for _ in range(0, n, 64):
            a = shapes.sample_attributes(64, generator)
            images = shapes.render(a, shapes.sample_style(64, generator))
            attributes.append(a)
            latents.append(vae.encode(images).half())
    return torch.cat(attributes), torch.cat(latents)


class Conditions:
    """What each prompt of the world encodes to, all 10206 of them, so that training waits for no text encoder."""

    def __init__(self, encode: Callable[[list[str]], dict[str, Tensor]]) -> None:
        self.sizes = [len(values) + 1 for values in shapes.ATTRIBUTES.values()]  # 0: not stated
        rows = torch.cartesian_prod(*[torch.arange(size) for size in self.sizes])
        prompts = [shapes.prompt((r - 1).clamp(min=0), r > 0) if r.any() else "" for r in rows]
        parts = [encode(prompts[i : i + 128]) for i in range(0, len(prompts), 128)]
        self.all = map_cond(lambda *some: torch.cat(some), *parts)

    def __call__(self, attributes: Tensor, stated: Tensor) -> Cond:
        """attributes (B, 5), stated (B, 5) bool -> the conditions of B prompts."""
        row = torch.zeros(len(attributes), dtype=torch.int64)
        for i, size in enumerate(self.sizes):
            row = row * size + torch.where(stated[:, i], attributes[:, i] + 1, 0)
        return map_cond(lambda all: all[row], self.all)


def draw_times(n: int, generator: torch.Generator) -> Tensor:
    """Half of them uniform, half even in log sigma/alpha over LOW. (n,) in [0, 1]."""
    t = torch.arange(1000, dtype=torch.float64) / 999
    levels = SCHEDULE.sigma(t) / SCHEDULE.alpha(t)
    low, high = (torch.tensor(v, dtype=torch.float64).log() for v in LOW)
    wanted = (low + (high - low) * rand((n - n // 2,), generator)).exp()
    return torch.cat([rand((n // 2,), generator), torch.searchsorted(levels, wanted).clamp(max=999).float() / 999])


def x0_weight(schedule: Schedule, t: Tensor) -> Tensor:
    return (1 + schedule.snr(t)).clamp(max=WEIGHT_CAP)


def train(
    pool: tuple[Tensor, Tensor],
    conditions: Conditions,
    minutes: float,
    unet: nn.Module | None = None,
    seed: int = 0,
    work: Path | None = None,
    batch: int = 48,
    lr: float = 1e-3,
    every: Callable[[dict[float, nn.Module], float], None] = lambda averages, minutes: None,
) -> dict[float, nn.Module]:
    """Train for a time budget on (attributes, latents); returns the averages by their decay. every: as for `fit`."""
    torch.manual_seed(seed)  # the initial weights
    unet = unet or UNet2DConditionModel(**CONFIG)
    denoiser = from_net(lambda x, i, cond: unet(x, i, **cond, return_dict=False)[0], SCHEDULE, PREDICTION)
    attributes, latents = pool

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[rows].float()
        t = draw_times(batch, generator)
        x_t = SCHEDULE.noise(x0, t, randn(x0.shape, generator)).float()
        said = shapes.sample_stated(batch, generator) & (rand((batch, 1), generator) >= NULL_SHARE)
        error = denoiser(x_t, t, conditions(attributes[rows], said)) - x0
        return (expand(x0_weight(SCHEDULE, t), x0) * error.square()).mean()

    with half_convolutions():
        how = {"seed": seed, "name": "teacher", "work": work, "averages": DECAYS, "every": every}
        return fit(unet, loss, minutes, lr, **how)


@torch.no_grad()
def grow(unet: UNet2DConditionModel, old: UNet2DConditionModel) -> UNet2DConditionModel:
    """Start from a trained net with one layer at 8x8, whatever its latents: all that fits is taken over, and the new
    layers begin as the identity, so that between its first and last convolution the net computes what the old did."""
    mine, theirs = unet.state_dict(), old.state_dict()
    for name in mine:
        source = name
        if name.startswith("up_blocks.1.resnets."):  # the new layer comes first on the way up, last on the way down
            index = int(name.split(".")[3])
            source = name.replace(f"resnets.{index}", f"resnets.{index - 1}")
        if source in theirs and theirs[source].shape == mine[name].shape:
            mine[name].copy_(theirs[source])
    for layer in ("down_blocks.0.resnets.1", "up_blocks.1.resnets.0"):
        mine[f"{layer}.conv2.weight"].zero_()
        mine[f"{layer}.conv2.bias"].zero_()
    skip = "up_blocks.1.resnets.0.conv_shortcut"
    width = mine[f"{skip}.weight"].shape[0]
    mine[f"{skip}.weight"].zero_()[:, :width, 0, 0] = torch.eye(width)
    mine[f"{skip}.bias"].zero_()
    return unet
