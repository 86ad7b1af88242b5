"""`distill export`: a student in the form that another program opens."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    import torch

    from ..adapters import Folded


@dataclass(frozen=True)
class Export:
    """Write a student, or any model that OneStep opens, in another form.

    onestep: a file for OneStep Load Student. comfy: a file for ComfyUI's own loaders. diffusers: a folder for
    `from_pretrained`. lora: a file for ComfyUI's LoraLoader. lora-diffusers: one for `pipe.load_lora_weights`. A LoRA
    becomes one of the first three by being added to its base; full weights become a LoRA by what singular values leave.
    """

    model: tyro.conf.Positional[str]
    """A student of `distill train`: a file, full or LoRA, or a folder."""
    out: tyro.conf.Positional[Path]
    """The file or folder to write."""
    format: Literal["onestep", "comfy", "diffusers", "lora", "lora-diffusers"] = "onestep"
    base: str | None = None
    """The model that a LoRA adds to: its file or folder. Default: the bundled one of that name."""
    rank: int = 64
    """Of a LoRA that is made of full weights; what is left of the difference is told."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Of the weights. Default: float16, and float32 for a LoRA."""
    figures: Path | None = None
    """What `distill eval --out` wrote of this model, for the card and the metadata."""
    force: bool = False
    """Overwrite `out`."""


def run(o: Export) -> Path:
    """Write it; where it is. Raises CheckpointError for what cannot be opened, or has no such form."""
    from ..checks import within

    within(o, rank=(1, inf))
    from .console import open_model, refuse_existing, writable

    folder = o.format == "diffusers"
    refuse_existing(o.out, o.force)
    writable(o.out, folder=folder)
    import torch

    dtype = getattr(torch, o.dtype) if o.dtype else None
    figures = {"metrics": read_figures(o.figures)} if o.figures else {}
    if o.format.startswith("lora"):
        written = write_lora(o, dtype or torch.float32, figures)
    else:
        model = open_model(o.model, "cpu", o.base)
        save = {"onestep": model.save, "comfy": model.save_comfy, "diffusers": model.save_folder}[o.format]
        how = figures | ({"dtype": dtype} if dtype else {})
        if o.format == "onestep" and model.meta.guidance.get("baked"):
            how["workflow"] = model.graph(o.out, "")
        written = save(o.out, model.net, **how)
    print(written)
    return written


def read_figures(path: Path) -> dict[str, Any]:
    """What `distill eval --out` wrote. Raises ValueError where it is something else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: no figures of `distill eval --out`. Measure the model again.")
    return found


def write_lora(o: Export, dtype: torch.dtype, figures: dict[str, Any]) -> Path:
    """A LoRA of a LoRA, under other names, or of full weights."""
    from ..backbones import FAMILIES, family, load
    from ..backbones.folder import takes_loras
    from ..file import lora
    from ..header import CheckpointError
    from ..tutorial.bundled import find
    from .console import base_of

    path = find(o.model)
    if lora.is_lora(path):
        held = lora.read(path)
    else:
        model = load(path)
        base = load(base_of(o.base, model.meta.teacher, f"{path} has full weights"))
        held = lora.of_student(extract(o, base.net, model.net), base.name, model.main, model.meta)
    kind = held.said["family"]
    if o.format == "lora" and not (kind in FAMILIES and family(kind).comfy_loras):
        raise CheckpointError(f"{path}: ComfyUI's LoraLoader knows no {kind!r}. Export it as lora-diffusers.")
    if o.format == "lora-diffusers" and not takes_loras(FAMILIES[kind][1] if kind in FAMILIES else []):
        raise CheckpointError(f"{path}: diffusers' pipelines of {kind!r} take no LoRA. Export it as diffusers.")
    held = replace(held, said=held.said | {name: json.dumps(v) for name, v in figures.items()})
    named = {"lora": lora.comfy_names, "lora-diffusers": lora.peft_names}[o.format]
    return lora.write(o.out, held, named, dtype)


def extract(o: Export, before: torch.nn.Module, after: torch.nn.Module) -> Folded:
    """The difference of two nets at a rank. Raises ValueError where they are not of one architecture."""
    from ..adapters import extracted

    ours, theirs = ({n: p.shape for n, p in net.named_parameters()} for net in (after, before))
    if ours != theirs:
        raise ValueError(f"{o.model}: another architecture than its base's: give the model it was made of as --base")
    found, left = extracted(before, after, o.rank)
    print(f"rank {found.rank} leaves {left:.1%} of the difference")
    return found
