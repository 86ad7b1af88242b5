"""Batches of prompts and of pictures. A source of batches is called as batches(step, generator)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator, Tensor

from ..backbones.base import Backbone
from ..denoiser import Cond, map_cond
from ..methods.base import Batches, Told
from ..shards import Rows, hashed
from .cache import Make, identity, in_memory, on_disk


def prompt_rows(
    model: Backbone,
    prompts: list[str],
    cache: Path | None = None,
    dtype: torch.dtype | None = None,
    told: Told | None = None,
) -> Rows:
    """The conditions of prompts. cache: a folder for them, as large as need be; None keeps them in memory. dtype: how
    they are stored there, by default as they are encoded. told: as for a method's data."""

    def make(numbers: range) -> Cond:
        return encode_all(model, [prompts[i] for i in numbers])

    return _rows(make, len(prompts), cache, [prompts, identity(model, text_encoders(model)), dtype], dtype, told)


def prompt_batches(
    model: Backbone, prompts: list[str] | Rows, batch_size: int, cache: Path | None = None, told: Told | None = None
) -> Batches:
    """Batches over a list of prompts, or over rows that `prompt_rows` made: {"cond", "shape"}. cache: see there."""
    rows = prompts if isinstance(prompts, Rows) else prompt_rows(model, prompts, cache, told=told)
    shape = model.shape(batch_size)

    def batches(step: int, generator: Generator) -> dict:
        return {"cond": rows[torch.randint(len(rows), (batch_size,), generator=generator)], "shape": shape}

    return batches


PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def image_batches(
    model: Backbone,
    folder: str | Path,
    batch_size: int,
    size: int | None = None,
    cache: Path | None = None,
    told: Told | None = None,
) -> Batches:
    """Batches of pictures, encoded once: {"x0": latents (B, C, h, w), "cond"}.

    folder: pictures, each with its prompt in a .txt file of its name, or without one for the empty prompt; size: pixels
    a side, by default what the net was trained at. Pictures are scaled and cut to a square. cache: as for prompt_rows.
    Raises ValueError for a folder without any.
    """
    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(sorted(PICTURES))}).")
    side = model.shape(1, size)[-1] * model.meta.latent["factor"]
    words = [t.read_text("utf-8").strip() if (t := f.with_suffix(".txt")).is_file() else "" for f in files]

    def make(numbers: range) -> Cond:
        with torch.no_grad():
            latents = [model.to_latents(pixels(files[i], side)[None].to(model.device)) for i in numbers]
        return {"x0": torch.cat(latents), "cond": encode_all(model, [words[i] for i in numbers])}

    seen = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    about = [words, seen, side, identity(model, ["vae", *text_encoders(model)])]
    rows = _rows(make, len(files), cache, about, None, told)
    return lambda step, generator: rows[torch.randint(len(files), (batch_size,), generator=generator)]


def pixels(file: Path, side: int) -> Tensor:
    """A picture, scaled and cut to a square: (3, side, side) in [-1, 1]."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(file) as picture:
        square = ImageOps.fit(picture.convert("RGB"), (side, side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1


def text_encoders(model: Backbone) -> list[str]:
    """The names of the parts that encode prompts, as diffusers calls them."""
    return [name for name in model.parts if name.startswith("text_encoder")]


def _rows(
    make: Make, count: int, cache: Path | None, about: list, dtype: torch.dtype | None, told: Told | None
) -> Rows:
    return in_memory(make, count) if cache is None else on_disk(cache, hashed(about), make, count, dtype, told)


def encode_all(model: Backbone, prompts: list[str], batch: int = 64) -> Cond:
    """Any number of prompts, encoded in batches."""
    parts = [model.encode(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
    return map_cond(lambda *rows: torch.cat(rows), *parts)
