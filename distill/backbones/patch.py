"""The tutorial's autoencoder: (B, 3, 64, 64) pictures to (B, C, 8, 8) latents and back, most of its weights at 8x8.

Stable Diffusion's AutoencoderKL works at full resolution, too slowly to train on a CPU. This one folds pixels into
channels: all 8x8 at once, or by a pyramid in steps of 2x2, which costs twice as much and draws points and corners that
the other rounds off. Plain torch, because ComfyUI loads it too.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        """(B, width, h, w) -> the same shape."""
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class PatchAutoencoder(nn.Module):
    """Encoder and decoder on patches of `factor` pixels a side.

    pyramid: widths at twice, four times, ... the latent's resolution, the last at the pictures' own; factor is then
    2 ** len(pyramid), and detail, the width at full resolution without one, plays no part. Raises ValueError where the
    two do not agree.
    """

    def __init__(
        self,
        channels: int = 8,
        factor: int = 8,
        width: int = 128,
        depth: int = 3,
        detail: int = 12,
        pyramid: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config = {"type": "patch", "channels": channels, "factor": factor, "width": width, "depth": depth}
        self.config |= {"detail": detail} | ({"pyramid": list(pyramid)} if pyramid else {})
        if pyramid and factor != 2 ** len(pyramid):
            raise ValueError(f"factor is {factor}, a pyramid of {len(pyramid)} widths makes {2 ** len(pyramid)}")
        fold = (
            pyramid_down(pyramid, width) if pyramid else [nn.PixelUnshuffle(factor), nn.Conv2d(3 * factor**2, width, 1)]
        )
        unfold = pyramid_up(pyramid, width) if pyramid else patches_up(factor, width, detail)
        self.encoder = nn.Sequential(
            *fold,
            *[Block(width) for _ in range(depth - 1)],
            nn.Conv2d(width, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            *[Block(width) for _ in range(depth)],
            *unfold,
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


def patches_up(factor: int, width: int, detail: int) -> list[nn.Module]:
    """(B, width, h, w) -> (B, 3, h * factor, w * factor), all at once."""
    return [
        nn.SiLU(),
        nn.Conv2d(width, detail * factor**2, 1),
        nn.PixelShuffle(factor),
        nn.SiLU(),
        nn.Conv2d(detail, 3, 3, padding=1),  # at full resolution: hides the seams between patches
    ]


def pyramid_down(pyramid: Sequence[int], width: int) -> list[nn.Module]:
    """Pictures (B, 3, H, W) -> (B, width, h, w). Its finest convolutions are at half the pictures' resolution."""
    layers: list[nn.Module] = []
    before = 3
    for i, after in enumerate((*pyramid[-2::-1], width)):
        size = 3 if i == 0 else 1
        layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * before, after, size, padding=size // 2)]
        layers += [Block(after)] if i < len(pyramid) - 1 else []
        before = after
    return layers


def pyramid_up(pyramid: Sequence[int], width: int) -> list[nn.Module]:
    """(B, width, h, w) -> pictures (B, 3, H, W). No norms at full resolution, where they would cost most."""
    layers: list[nn.Module] = []
    *coarse, fine = pyramid
    for after in coarse:
        layers += [nn.Conv2d(width, 4 * after, 1), nn.PixelShuffle(2), Block(after)]
        width = after
    layers += [nn.SiLU(), nn.Conv2d(width, 4 * fine, 1), nn.PixelShuffle(2), nn.SiLU()]
    return [*layers, nn.Conv2d(fine, fine, 3, padding=1), nn.SiLU(), nn.Conv2d(fine, 3, 3, padding=1)]
