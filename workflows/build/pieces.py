"""What descriptions of workflows and blueprints are put together from."""

from __future__ import annotations

from typing import Any

from draw import Box

WORLD = "a large yellow star on a blue background, in the center"


def box(kind: str, title: str | None = None, **inputs: Any) -> Box:
    return Box(kind, inputs, title)


def student(file: str = "bundled: student", title: str | None = None) -> Box:
    return box("OneStepLoadStudent", title, file=file)


def text(clip: tuple[str, int], words: str, title: str = "Prompt") -> Box:
    return Box("CLIPTextEncode", {"clip": clip, "text": words}, title, prompt=True)


def empty(side: int = 64, count: int = 4) -> Box:
    return box("EmptyLatentImage", width=side, height=side, batch_size=count)


def seed(title: str = "Seed, for both") -> Box:
    return box("PrimitiveInt", title, value=1)


def sample(model: str, positive: str, latent: str = "empty", seed: Any = 1, title: str | None = None) -> Box:
    inputs = {"model": (model, 0), "positive": (positive, 0), "latent": (latent, 0), "seed": seed}
    return Box("OneStepSample", inputs, title)


def decode(latent: str, vae: tuple[str, int]) -> Box:
    return box("VAEDecode", samples=(latent, 0), vae=vae)


def larger(image: str) -> Box:
    return box("ImageScaleBy", image=(image, 0), upscale_method="nearest-exact", scale_by=4)


def save(images: tuple[str, int], title: str, prefix: str, height: int = 300) -> Box:
    return Box("SaveImage", {"images": images, "filename_prefix": f"OneStep/{prefix}"}, title, height)


def show(source: tuple[str, int], title: str, height: int = 140) -> Box:
    return Box("PreviewAny", {"source": source}, title, height)


def needs(kind: str, models: list[dict[str, str]], **inputs: Any) -> Box:
    """A loader, and the files it wants."""
    return Box(kind, inputs, models=models)


def advanced(model: tuple[str, int], positive: str, latent: str) -> dict[str, Box]:
    """OneStepRecipe and what turns its outputs into a latent, "sampled"."""
    return {
        "recipe": box("OneStepRecipe", model=model),
        "noise": box("RandomNoise", noise_seed=1),
        "guider": box("BasicGuider", model=("recipe", 0), conditioning=(positive, 0)),
        "sampled": box(
            "SamplerCustomAdvanced", noise=("noise", 0), guider=("guider", 0), sampler=("recipe", 1),
            sigmas=("recipe", 2), latent_image=(latent, 0),
        ),
    }  # fmt: skip


def split(boxes: dict[str, Box], *columns: int) -> list[dict[str, Box]]:
    """Boxes in columns of so many."""
    items, out = list(boxes.items()), []
    for count in columns:
        out.append(dict(items[:count]))
        items = items[count:]
    return out
