"""The tutorial's autoencoder: (B, 3, 64, 64) pictures to (B, 8, 8, 8) latents and back, almost all of it at 8x8.

Stable Diffusion's AutoencoderKL works at full resolution, too slowly to train on a CPU. This one folds 8x8 pixels into
channels first. Plain torch, because ComfyUI loads it too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class PatchAutoencoder(nn.Module):
    """Encoder and decoder on patches of `factor` pixels a side."""

    def __init__(self, channels: int = 8, factor: int = 8, width: int = 128, depth: int = 3, detail: int = 12) -> None:
        super().__init__()
        self.config = {
            "type": "patch",
            "channels": channels,
            "factor": factor,
            "width": width,
            "depth": depth,
            "detail": detail,
        }
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(factor),
            nn.Conv2d(3 * factor**2, width, 1),
            *[Block(width) for _ in range(depth - 1)],
            nn.Conv2d(width, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            *[Block(width) for _ in range(depth)],
            nn.SiLU(),
            nn.Conv2d(width, detail * factor**2, 1),
            nn.PixelShuffle(factor),
            nn.SiLU(),
            nn.Conv2d(detail, 3, 3, padding=1),  # at full resolution: hides the seams between patches
        )

    @classmethod
    def from_config(cls, config: dict) -> PatchAutoencoder:
        """The autoencoder that a file's metadata describes, untrained."""
        return cls(**{k: v for k, v in config.items() if k != "type"})

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of factor -> (B, channels, H/factor, W/factor)."""
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, 3, h*factor, w*factor), about in [-1, 1]; clamp before showing."""
        return self.decoder(latents)

    @torch.no_grad()
    def normalise(self, images: Tensor) -> None:
        """Fold each latent channel's mean and spread over `images` into the weights: latents get mean 0, spread 1."""
        z = self.encode(images)
        m, s = z.mean((0, 2, 3)), z.std((0, 2, 3))
        last, first = self.encoder[-1], self.decoder[0]
        last.weight /= s[:, None, None, None]
        last.bias.copy_((last.bias - m) / s)
        first.bias += first.weight[:, :, 0, 0] @ m
        first.weight *= s[None, :, None, None]
