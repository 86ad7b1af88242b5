"""Nets whose features figures are made of, opened from local files. Nothing is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 299
"""Pixels a side that Inception sees."""
INCEPTION = "inception-2015-12-05.pt"
"""NVIDIA's TorchScript of the net that FID is defined by; clean-fid takes the same file."""


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names."""
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            total.update(str(file.relative_to(path)).encode())
        with file.open("rb") as f:
            while block := f.read(1 << 20):
                total.update(block)
    return total.hexdigest()


class Inception:
    """Pool features (B, 2048) of pictures, as clean-fid takes them (Parmar et al. 2022): each in 8 bits, resized
    by PIL's bicubic filter, in floats, a channel at a time."""

    protocol = f"8 bits a channel; PIL bicubic with antialiasing to {SIDE}, float; (x - 128) / 128"

    def __init__(self, path: Path, device: torch.device):
        """Raises ValueError for a file that is absent or no such TorchScript."""
        cure = f"put {INCEPTION}, NVIDIA's TorchScript of Inception V3, there and name it by --inception"
        if not path.is_file():
            raise ValueError(f"{path}: no such file: {cure}")
        try:
            self.net = torch.jit.load(str(path), map_location=device).eval().layers
        except (RuntimeError, AttributeError, ValueError) as e:
            raise ValueError(f"{path}: not that net ({str(e).splitlines()[0][:80]}): {cure}") from None
        self.device, self.about = device, {"name": path.name, "sha256": digest(path)}

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        x = torch.stack([_resized(picture) for picture in pictures]).to(self.device)
        return self.net((x - 128) / 128).flatten(1).float().cpu()


def _resized(picture: Image.Image) -> Tensor:
    """(3, SIDE, SIDE), 0 to 255."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)
    channels = [Image.fromarray(array[..., i]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in range(3)]
    return torch.from_numpy(np.stack([np.asarray(c).clip(0, 255) for c in channels]))


class Clip:
    """CLIP's features (B, D) of pictures and of prompts, by transformers, from a folder."""

    def __init__(self, path: Path, device: torch.device):
        """Raises ValueError for a folder that holds no CLIP."""
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        try:
            if not path.is_dir():
                raise OSError("no such folder")
            self.model = CLIPModel.from_pretrained(path, local_files_only=True).eval().to(device)
            self.words = CLIPTokenizerFast.from_pretrained(path, local_files_only=True)
            self.pixels = CLIPImageProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as e:
            cure = "put a folder of transformers' CLIPModel there, such as openai/clip-vit-large-patch14"
            raise ValueError(f"{path}: no CLIP ({str(e).splitlines()[0].rstrip('.')}): {cure}") from None
        self.device, self.about = device, {"name": path.name, "sha256": digest(path)}
        self.protocol = f"{type(self.pixels).__name__} of the folder; 100 max(cos, 0)"

    @torch.no_grad()
    def pictures(self, pictures: list[Image.Image]) -> Tensor:
        """(B, D)."""
        pixels = self.pixels(images=[p.convert("RGB") for p in pictures], return_tensors="pt").pixel_values
        return _tensor(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """(B, D); what CLIP's 77 tokens do not hold is cut."""
        length = self.model.config.text_config.max_position_embeddings
        how = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        return _tensor(self.model.get_text_features(**self.words(prompts, **how).to(self.device)))


def _tensor(out: Tensor) -> Tensor:
    """transformers 5 wraps what 4 gave as it is."""
    return (out if isinstance(out, Tensor) else out.pooler_output).float().cpu()
