"""Trains the tutorial's autoencoder on fresh renders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.patch import PatchAutoencoder
from . import shapes
from .fit import fit

NOISE = 0.2  # spread of the noise on latents in training: smooths the latent space, as a VAE's posterior does
POLISH_NOISE = 0.07  # about the error of a good sampler's latents
PRIOR_WEIGHT = 2e-4  # on mean z^2, which with a fixed posterior spread is all that is left of the KL term


def pictures(n: int, generator: torch.Generator, held_out: bool | None = False) -> Tensor:
    """n random renders, (n, 3, 64, 64) in [-1, 1]."""
    return shapes.render(shapes.sample_attributes(n, generator, held_out), shapes.sample_style(n, generator))


def train(minutes: float = 10, seed: int = 0, batch: int = 32, **config: int) -> PatchAutoencoder:
    torch.manual_seed(seed)  # the initial weights; nothing else reads the global generator
    vae = PatchAutoencoder(**config)

    def loss(generator: torch.Generator) -> Tensor:
        x = pictures(batch, generator)
        z = vae.encode(x)
        y = vae.decode(z + NOISE * torch.randn(z.shape, generator=generator))
        return difference(y, x) + PRIOR_WEIGHT * z.square().mean()

    vae = fit(vae, loss, minutes, lr=2e-3, seed=seed, name="vae", ema=0.998, flat=0.4)
    vae.normalise(pictures(512, torch.Generator().manual_seed(seed + 1)))
    return vae


def polish(vae: PatchAutoencoder, minutes: float = 44, seed: int = 1, batch: int = 32) -> PatchAutoencoder:
    """Train the decoder alone, under less noise. The latents stay as they are, so the teacher can train meanwhile."""
    vae.encoder.requires_grad_(False)
    vae.decoder.requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        x = pictures(batch, generator)
        with torch.no_grad():
            z = vae.encode(x)
        return difference(vae.decode(z + POLISH_NOISE * torch.randn(z.shape, generator=generator)), x)

    return fit(vae, loss, minutes, lr=1e-3, seed=seed, name="decoder", ema=0.998, flat=0.4)


def difference(y: Tensor, x: Tensor) -> Tensor:
    """L1 and L2 on pixels, and L1 on the steps between neighbours, which keeps edges sharp."""
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges


@torch.no_grad()
def encode(vae: PatchAutoencoder, images: Tensor, batch: int = 64) -> Tensor:
    """(B, 3, 64, 64) in [-1, 1] -> (B, 8, 8, 8)."""
    return torch.cat([vae.encode(x) for x in images.split(batch)])


@torch.no_grad()
def decode(vae: PatchAutoencoder, latents: Tensor, batch: int = 64) -> Tensor:
    """(B, 8, 8, 8) -> (B, 3, 64, 64) in [-1, 1]."""
    return torch.cat([vae.decode(z).clamp(-1, 1) for z in latents.split(batch)])
