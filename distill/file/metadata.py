"""What a file says about itself: its safetensors header, parsed and checked. Needs no weights, and no ComfyUI."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..header import LORA, CheckpointError, read_header
from ..schedule import from_spec
from .rules import Wrong, need
from .schema import FIELDS, PARTS, agree, deepest

VERSION = 1
LONGEST = 16_000_000
"""characters of a file's metadata: a tokenizer has up to 4 million, a graph less"""
CURE = "Download the file again, or make it again with `distill train` or OneStep Quantize."


@dataclass(frozen=True)
class Metadata:
    """Everything a loader must know besides the weights, parsed. Stored as flat strings, JSON where nested."""

    architecture: dict[str, Any]
    """{"unet": UNet2DConditionModel's config, "vae": AutoencoderKL's or {"type": "patch", ...} for PatchAutoencoder,
    "text_encoder": CLIPTextConfig's}; the last two may be None"""
    prediction: str
    """what the U-Net puts out: x0, eps, v or flow (noise minus image)"""
    schedule: dict[str, Any]
    """what `schedule.from_spec` takes: {"kind": "ddpm", "shift": 4.0, ...}"""
    t_in: float
    """the timestep the net is first called at, as the net counts them (999 of 0..999)"""
    latent: dict[str, Any]
    """{"channels", "scale", "shift", "factor", "rgb_factors", "rgb_bias"}: the net sees (z - shift) * scale; the VAE
    shrinks images by factor; rgb_* turn what the net sees into a rough preview in [-1, 1]"""
    family: str = "stable_diffusion"
    """which of `backbones` opens it"""
    method: str = "teacher"
    """what trained it: teacher, vsd, sds, regression, ..."""
    steps: int = 1
    """recommended number of steps"""
    times: list[float] | None = None
    """of a student of several calls: the timestep of each, as the net counts them, falling from t_in"""
    guidance: dict[str, Any] = field(default_factory=lambda: {"scale": 1.0, "baked": True})
    """scale, and whether it is already in the weights (a student) or to be applied (a teacher)"""
    text_encoder: dict[str, Any] | None = None
    """{"tokenizer": the tokenizers library's JSON, "max_length": tokens, "start", "end", "pad": ids; files without the
    first two mean the text encoder's bos_token_id and eos_token_id, without the last the end}"""
    teacher: str = ""
    license: str = "Apache-2.0"
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """the training options"""
    quantization: dict[str, Any] | None = None
    """how the weights were quantized, and what it cost; None: not at all"""
    workflow: dict[str, Any] | None = None
    """a ComfyUI graph; dropping the file on the canvas opens it"""

    def calls(self, steps: int) -> list[float]:
        """The times in (0, 1] of so many calls: those it was trained at, where it has so many; else even ones from t_in
        down."""
        schedule = from_spec(self.schedule)
        if self.times and steps <= len(self.times):
            return [float(schedule.time(i)) for i in self.times[:steps]]
        return [float(schedule.time(self.t_in)) * (1 - i / steps) for i in range(steps)]

    def timesteps(self, steps: int) -> list[float]:
        """`calls` as the net counts time."""
        return from_spec(self.schedule).index(torch.tensor(self.calls(steps), dtype=torch.float64)).tolist()

    def to_strings(self) -> dict[str, str]:
        """As a file's header holds it. Raises CheckpointError where a value cannot be right, or is no JSON."""
        self.check("this model", "Nothing was written.")
        strings = {"onestep.version": str(VERSION)}
        for f in fields(self):
            value = getattr(self, f.name)
            try:
                if value is not None:
                    strings[f.name] = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as e:
                raise CheckpointError(
                    f"this model: metadata {f.name!r} is no JSON ({e}). Nothing was written."
                ) from None
        return strings

    @classmethod
    def from_strings(
        cls, strings: Mapping[str, str], path: str | Path = "this file", tensors: int | None = None
    ) -> Metadata:
        """Parse and check; tensors: how many the file has. Raises CheckpointError with path, key, value and cure."""
        if LORA in strings:
            base = strings.get("base", "its base")[:200]
            raise CheckpointError(f"{path}: a LoRA of {base!r}, no whole model. Merge the two with `distill export`.")
        if "onestep.version" not in strings:
            raise CheckpointError(
                f"{path}: not a OneStep file: its metadata has no 'onestep.version'. "
                "Open ordinary models with ComfyUI's own loaders; as a teacher give a diffusers folder, which "
                "from_single_file and save_pretrained make of it."
            )
        version = strings["onestep.version"]
        if version not in map(str, range(VERSION + 1)):
            raise CheckpointError(f"{path}: written by a newer OneStep (version {version[:20]!r}). Update OneStep.")
        length = sum(len(strings.get(f.name, "")) for f in fields(cls))
        if length > LONGEST:
            raise CheckpointError(f"{path}: damaged: {length} characters of metadata, over {LONGEST}. {CURE}")
        values = {}
        for f in fields(cls):
            if f.name in strings:
                text = strings[f.name]
                try:
                    values[f.name] = text if f.type == "str" else json.loads(text, parse_constant=_no_number)
                except (ValueError, RecursionError) as e:
                    raise CheckpointError(f"{path}: metadata {f.name!r} is not JSON ({e}). {CURE}") from None
            elif f.default is MISSING and f.default_factory is MISSING:
                raise CheckpointError(f"{path}: metadata {f.name!r} is missing. {CURE}")
        if isinstance(values["latent"], dict):
            values["latent"] = {"scale": 1.0, "shift": 0.0, "factor": 8} | values["latent"]
        meta = cls(**values)
        meta.check(path, tensors=tensors)
        return meta

    def check(self, path: str | Path, cure: str = CURE, tensors: int | None = None) -> None:
        """Raise CheckpointError where a value cannot be right by itself, beside the others, or for so many tensors."""
        try:
            for f in fields(self):
                FIELDS[f.name](f.name, getattr(self, f.name))
            parts = PARTS.get(self.family, {})
            for name, rule in parts.items():
                rule(f"architecture.{name}", self.architecture.get(name))
            if parts:
                agree(self)
            if tensors is not None:
                deepest(self, tensors)
            self._check_times()
        except Wrong as e:
            raise CheckpointError(f"{path}: {e}. {cure}") from None

    def _check_times(self) -> None:
        """Raise Wrong where the schedule has no noise levels, or not at t_in; or for times that do not fall from it."""
        schedule = from_spec(self.schedule)
        try:
            t = float(schedule.time(self.t_in))
        except ArithmeticError:
            t = math.nan
        need(0 < t <= 1 + 1e-9, "t_in", self.t_in, "a timestep of the schedule")
        if self.times is not None:
            levels = [float(schedule.time(i)) for i in self.times]
            falls = all(a > b > 0 for a, b in zip(levels, levels[1:]))
            need(self.times[:1] == [self.t_in] and falls, "times", self.times, "timesteps that fall from t_in")
        levels = torch.stack([f(torch.tensor([0.0, min(t, 1.0), 1.0])) for f in (schedule.alpha, schedule.sigma)])
        sound = levels.isfinite().all() and levels[1, 0] < levels[1, 2]
        need(bool(sound), "schedule", self.schedule, "one whose noise grows and stays finite")


def described(path: str | Path) -> Metadata | None:
    """What a safetensors file says of how it is called, where OneStep wrote it, for whatever loader; else None.

    Raises CheckpointError where that cannot be.
    """
    strings = read_header(path).get("__metadata__", {})
    if not {"prediction", "schedule", "t_in", "latent", "architecture"} <= strings.keys():
        return None
    return Metadata.from_strings({"onestep.version": str(VERSION)} | strings, path)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_metadata(path: str | Path) -> Metadata:
    """Metadata from the header alone (no tensors). Raises CheckpointError."""
    header = read_header(path)
    return Metadata.from_strings(header.pop("__metadata__", {}), path, len(header))
