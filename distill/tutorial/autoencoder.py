"""Trains the tutorial's autoencoder on fresh renders."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.patch import PatchAutoencoder
from . import shapes
from .features import Features
from .fit import fit, half_convolutions

CONFIG = {"channels": 12, "pyramid": (64, 32, 16)}
"""12 channels hold what 8 rounded off; a pyramid draws points that one unfolding of 8x8 pixels did not: Frechet
distance of encoded real pictures 11 after 28 minutes on one core, 36 after 52 on two without either."""
NOISE = 0.15
"""Most noise on latents in training, as a share of their spread: a decoder has to bear a sampler's error, which is
about as large, and each picture draws its own share, so that clean latents are decoded too."""
FEATURE_WEIGHT = 0.1  # on L1 between features, each stage's by its own spread
PRIOR_WEIGHT = 2e-4  # on mean z^2
DECAY = 0.998


def pictures(n: int, generator: torch.Generator, held_out: bool | None = False) -> Tensor:
    """n random renders, (n, 3, 64, 64) in [-1, 1]."""
    return shapes.render(shapes.sample_attributes(n, generator, held_out), shapes.sample_style(n, generator))


def train(
    minutes: float, features: Features, seed: int = 0, work: Path | None = None, batch: int = 32
) -> PatchAutoencoder:
    """An autoencoder whose latents have mean 0 and spread 1 in every channel."""
    torch.manual_seed(seed)  # the initial weights; nothing else reads the global generator
    vae = PatchAutoencoder(**CONFIG).to(memory_format=torch.channels_last)
    with half_convolutions():
        how = {"seed": seed, "name": "autoencoder", "work": work, "averages": (DECAY,)}
        vae = fit(vae, loss_of(vae, features, batch), minutes, 2e-3, **how)[DECAY]
    vae.normalise(pictures(1024, torch.Generator().manual_seed(seed + 1)))
    return vae.requires_grad_(False)


def polish(
    vae: PatchAutoencoder, minutes: float, features: Features, seed: int = 1, work: Path | None = None, batch: int = 32
) -> PatchAutoencoder:
    """Train the decoder alone. The latents stay as they are, so that a teacher can train meanwhile."""
    vae.requires_grad_(True).encoder.requires_grad_(False)
    with half_convolutions():
        how = {"seed": seed, "name": "decoder", "work": work, "averages": (DECAY,)}
        vae = fit(vae, loss_of(vae, features, batch), minutes, 1e-3, **how)[DECAY]
    return vae.requires_grad_(False)


def loss_of(vae: PatchAutoencoder, features: Features, batch: int):
    """Pixels, edges and features of pictures that are decoded from noised latents."""
    scales = [m.std() for m in features.maps(pictures(256, torch.Generator().manual_seed(3)))]

    def loss(generator: torch.Generator) -> Tensor:
        x = pictures(batch, generator).contiguous(memory_format=torch.channels_last)
        z = vae.encode(x)
        noise = NOISE * torch.rand(batch, 1, 1, 1, generator=generator) * z.detach().std((0, 2, 3), keepdim=True)
        y = vae.decode(z + noise * torch.randn(z.shape, generator=generator))
        with torch.no_grad():
            wanted = features.maps(x)
        seen = sum(F.l1_loss(a, b) / scale for a, b, scale in zip(features.maps(y), wanted, scales))
        return difference(y, x) + FEATURE_WEIGHT * seen + PRIOR_WEIGHT * z.square().mean()

    return loss


def difference(y: Tensor, x: Tensor) -> Tensor:
    """L1 and L2 on pixels, and L1 on the steps between neighbours, which keeps edges sharp."""
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges
