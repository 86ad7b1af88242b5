"""LoRA files: a student as what it adds to its teacher, the base.

Layers are named as peft and diffusers name them, PART.LAYER.lora_A.weight, so that `pipe.load_lora_weights` takes the
file; ComfyUI's LoraLoader takes what `comfy_names` makes of it. The scale is in the weights: alpha is the rank.
Metadata tells what a OneStep file's does but for what the base knows, and the base's name, part, rank and alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import Folded
from ..header import LORA, CheckpointError, read_header
from ..packed import formats
from .checkpoint import store
from .metadata import Metadata

FIELDS = (
    "family", "method", "teacher", "prediction", "schedule", "t_in", "steps", "guidance", "metrics", "config",
    "license",
)  # fmt: skip
"""What the student's own metadata says; the rest is the base's."""
TIMES = "times"  # the student's own too, where it has several calls
CURE = "Download the file again, or train it again."


@dataclass(frozen=True)
class LoraFile:
    """What a file holds."""

    adapters: Folded
    base: str
    """The name of the model it was made of."""
    part: str
    """The part of a pipeline that is adapted: unet, transformer."""
    said: dict[str, str]
    """FIELDS of the student's metadata, as strings."""

    def student(self, base: Metadata, path: str | Path) -> Metadata:
        """The metadata of base and LoRA together. Raises CheckpointError where they cannot be."""
        return Metadata.from_strings(replace(base, times=None).to_strings() | self.said, path)

    def strings(self) -> dict[str, str]:
        """The file's metadata."""
        numbers = {"rank": str(self.adapters.rank), "alpha": f"{self.adapters.alpha:g}"}
        return {LORA: "1", "base": self.base, "part": self.part, **numbers, **self.said}


def of_student(adapters: Folded, base: str, part: str, meta: Metadata) -> LoraFile:
    """The LoRA of a student of this metadata; the other arguments are as LoraFile's."""
    return LoraFile(adapters, base, part, {k: v for k, v in meta.to_strings().items() if k in (*FIELDS, TIMES)})


def is_lora(path: Path) -> bool:
    """Whether this is a LoRA that OneStep wrote. Raises CheckpointError for a damaged safetensors file."""
    named = path.suffix == ".safetensors" and path.is_file()
    return named and LORA in read_header(path).get("__metadata__", {})


Named = Callable[[LoraFile], tuple[dict[str, Tensor], dict[str, str]]]
"""A LoRA -> its tensors under some names, and metadata."""


def write(path: str | Path, held: LoraFile, named: Named | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Write atomically. named: default `peft_names`, the only ones that `read` takes."""
    return store(path, *(named or peft_names)(held), dtype)


def read(path: str | Path) -> LoraFile:
    """Read and check. Raises CheckpointError for what is no LoRA that OneStep wrote."""
    loaded = formats.read(path)
    strings, tensors = loaded.metadata, loaded.weights
    for name in (LORA, "base", "part", "rank", "alpha", *FIELDS):
        if name not in strings:
            raise CheckpointError(f"{path}: no sound LoRA of OneStep: its metadata lacks {name!r}. {CURE}")
    try:
        rank, alpha = int(strings["rank"]), float(strings["alpha"])
    except ValueError:
        raise CheckpointError(f"{path}: metadata 'rank' or 'alpha' is no number. {CURE}") from None
    prefix = f"{strings['part']}."
    layers = {n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")}
    pairs = {f"{n}.lora_{way}.weight" for n in layers for way in "AB"}
    sound = tensors.keys() == pairs and all(n.startswith(prefix) for n in layers) and rank > 0 and 0 < alpha < 1e6
    if not sound or any(v.ndim < 2 or v.shape[n.endswith(".lora_B.weight")] != rank for n, v in tensors.items()):
        raise CheckpointError(f"{path}: damaged: it does not hold pairs of tensors for its {strings['part']}. {CURE}")
    adapters = Folded({n.removeprefix(prefix): v.float() for n, v in tensors.items()}, rank, alpha)
    said = {name: strings[name] for name in (*FIELDS, TIMES) if name in strings}
    return LoraFile(adapters, strings["base"], strings["part"], said)


def peft_names(held: LoraFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As peft and diffusers name them."""
    return {f"{held.part}.{name}": v for name, v in held.adapters.tensors.items()}, held.strings()


def comfy_names(held: LoraFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As ComfyUI's LoraLoader knows them: kohya's for a U-Net, diffusers' for a transformer."""
    if held.part != "unet":
        return peft_names(held)
    named: dict[str, Tensor] = {}
    for layer, (down, up) in held.adapters.pairs().items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        named |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        named[f"{name}.alpha"] = torch.tensor(float(len(down)))
    strings = {k: v for k, v in held.strings().items() if k not in (LORA, "alpha")}
    return named, strings | {"ss_network_module": "networks.lora", "ss_network_dim": strings["rank"]}
