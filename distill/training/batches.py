"""Batches of prompts and of pictures. A source of batches is called as batches(step, generator)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator

from ..backbones.base import Backbone, encode_all
from ..denoiser import map_cond
from ..methods.base import Batches


def prompt_batches(model: Backbone, prompts: list[str], batch_size: int) -> Batches:
    """Batches over a list of prompts, encoded once and kept in memory: {"cond", "shape"}."""
    cache, shape = encode_all(model, prompts), model.shape(batch_size)

    def batches(step: int, generator: Generator) -> dict:
        rows = torch.randint(len(prompts), (batch_size,), generator=generator)
        return {"cond": map_cond(lambda c: c[rows.to(c.device)], cache), "shape": shape}

    return batches


PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


def image_batches(model: Backbone, folder: str | Path, batch_size: int, size: int | None = None) -> Batches:
    """Batches of pictures, encoded once and kept in memory: {"x0": latents (B, C, h, w), "cond"}.

    folder: pictures, each with its prompt in a .txt file of its name, or without one for the empty prompt; size: pixels
    a side, by default what the net was trained at. Pictures are scaled and cut to a square. Raises ValueError for a
    folder without any.
    """
    import numpy as np
    from PIL import Image, ImageOps

    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(sorted(PICTURES))}).")
    side = model.shape(1, size)[-1] * model.meta.latent["factor"]
    latents = []
    for file in files:
        picture = ImageOps.fit(Image.open(file).convert("RGB"), (side, side))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(model.device) / 127.5 - 1
        with torch.no_grad():
            latents.append(model.to_latents(pixels))
    words = [t.read_text("utf-8").strip() if (t := f.with_suffix(".txt")).is_file() else "" for f in files]
    x0, cache = torch.cat(latents), encode_all(model, words)

    def batches(step: int, generator: Generator) -> dict:
        rows = torch.randint(len(files), (batch_size,), generator=generator).to(x0.device)
        return {"x0": x0[rows], "cond": map_cond(lambda c: c[rows], cache)}

    return batches
