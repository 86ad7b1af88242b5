"""One file per family of networks: how to open, encode, call, decode and save it. Nothing else knows a network class.

A new family is a file here with a subclass of `Backbone`, and a line in FAMILIES.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from ..file import checkpoint
from ..header import CheckpointError
from . import folder
from .base import Backbone

FAMILIES = {
    "stable_diffusion": ("StableDiffusion", ["StableDiffusionPipeline"]),
    "own": ("Own", []),
    "sdxl": ("SDXL", ["StableDiffusionXLPipeline"]),
    "sd3": ("SD3", ["StableDiffusion3Pipeline"]),
    "flux": ("Flux", ["FluxPipeline"]),
    "pixart": ("PixArt", ["PixArtAlphaPipeline", "PixArtSigmaPipeline"]),
    "sana": ("Sana", ["SanaPipeline"]),
}
"""Family, as metadata names it (and its module here): its class, and diffusers' pipelines that are of it."""


def family(name: str) -> type[Backbone]:
    """The class of a family. Raises KeyError for one that is not in FAMILIES."""
    return getattr(import_module(f".{name}", __package__), FAMILIES[name][0])


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """Open a OneStep file, a folder that diffusers' `save_pretrained` wrote, or a model of the Hugging Face hub by its
    name, org/model.

    Raises CheckpointError where it is not sound, is of no known family, lacks a part, or is not to be had.
    """
    name, path = str(path), Path(folder.from_hub(str(path)) if folder.is_hub_name(path) else path)
    if not path.is_dir():
        held = checkpoint.read(path)
        kind = held.meta.family
        if kind not in FAMILIES:
            raise CheckpointError(f"{path}: of the family {kind!r}, which this OneStep does not know. Update OneStep.")
        return family(kind).from_file(path, held, device, dtype)
    pipeline = folder.index(path)["_class_name"]
    for kind, (_, pipelines) in FAMILIES.items():
        if pipeline in pipelines:
            model = family(kind).from_folder(path, device, dtype)
            model.name = name if path != Path(name) else path.name
            return model
    known = ", ".join(p for _, pipelines in FAMILIES.values() for p in pipelines)
    raise CheckpointError(f"{path}: a {pipeline}, of which no backbone is known; there are {known}.")
