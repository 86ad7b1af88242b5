"""What a file says about itself: its safetensors header, parsed and checked. Needs no weights, and no ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..header import CheckpointError, read_header
from ..schedule import from_spec

VERSION = 1
PREDICTIONS = ("x0", "eps", "v", "flow")


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
    guidance: dict[str, Any] = field(default_factory=lambda: {"scale": 1.0, "baked": True})
    """scale, and whether it is already in the weights (a student) or to be applied (a teacher)"""
    text_encoder: dict[str, Any] | None = None
    """{"tokenizer": the tokenizers library's JSON, "max_length": tokens, "start", "end": ids; files without these two
    mean the text encoder's bos_token_id and eos_token_id}"""
    teacher: str = ""
    license: str = "Apache-2.0"
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """the training options"""
    quantization: dict[str, Any] | None = None
    """how the weights were quantized, and what it cost; None: not at all"""
    workflow: dict[str, Any] | None = None
    """a ComfyUI graph; dropping the file on the canvas opens it"""

    def to_strings(self) -> dict[str, str]:
        self.check("this model")
        strings = {"onestep.version": str(VERSION)}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                strings[f.name] = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        return strings

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: str | Path = "this file") -> Metadata:
        """Parse and check. Raises CheckpointError naming `path`, the key and the cure."""
        if "onestep.version" not in strings:
            raise CheckpointError(
                f"{path}: not a OneStep file: its metadata has no 'onestep.version'. "
                "Open ordinary models with ComfyUI's own loaders; make OneStep files with `distill train`."
            )
        version = strings["onestep.version"]
        if not version.isdigit() or int(version) > VERSION:
            raise CheckpointError(f"{path}: written by a newer OneStep (version {version!r}). Update OneStep.")
        values = {}
        for f in fields(cls):
            if f.name not in strings:
                continue
            text = strings[f.name]
            try:
                values[f.name] = text if f.type == "str" else json.loads(text)
            except json.JSONDecodeError as e:
                raise _metadata_error(path, f.name, f"is not JSON ({e})") from None
        missing = [k for k in ("architecture", "prediction", "schedule", "t_in", "latent") if k not in values]
        if missing:
            raise _metadata_error(path, missing[0], "is missing")
        meta = cls(**values)
        meta.check(path)
        return meta

    def check(self, path: str | Path) -> None:
        """Raise CheckpointError where a value cannot be right."""

        def need(ok: bool, key: str, problem: str) -> None:
            if not ok:
                raise _metadata_error(path, key, problem)

        for key in ("architecture", "schedule", "latent", "guidance", "metrics", "config"):
            need(isinstance(getattr(self, key), dict), key, "is not an object")
        for key in ("text_encoder", "quantization", "workflow"):
            need(isinstance(getattr(self, key), dict | None), key, "is not an object")
        unet = self.architecture.get("unet")
        need(isinstance(unet, dict), "architecture", "has no 'unet'")
        for key in ("in_channels", "block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim"):
            need(key in unet, "architecture", f"has a 'unet' without {key!r}")
        need(self.prediction in PREDICTIONS, "prediction", f"is {self.prediction!r}, not one of {PREDICTIONS}")
        try:
            schedule = from_spec(self.schedule)
        except ValueError as e:
            raise _metadata_error(path, "schedule", f"is wrong: {e}") from None
        in_range = isinstance(self.t_in, int | float) and 0 <= schedule.time(self.t_in) <= 1
        need(in_range, "t_in", f"is {self.t_in!r}, outside the schedule")
        need(isinstance(self.steps, int) and self.steps > 0, "steps", f"is {self.steps!r}, not a number of steps")
        channels, expected = self.latent.get("channels"), unet.get("in_channels")
        need(channels == expected, "latent", f"has {channels!r} channels where the U-Net takes {expected!r}")
        text = self.architecture.get("text_encoder")
        if text is not None:
            need(self.text_encoder is not None, "text_encoder", "is missing (the tokenizer)")
            # with eos_token_id 2, as SD 1.x has it, transformers pools at the highest id: CLIP's end token
            end, highest = self.text_encoder.get("end"), text.get("vocab_size", 0) - 1
            fits = text.get("eos_token_id") != 2 or end == highest
            need(fits, "architecture", f"has eos_token_id 2 where the end token {end} is not the highest id, {highest}")


def _metadata_error(path: str | Path, key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: metadata {key!r} {problem}. Write the file again with distill.file.write.")


def read_metadata(path: str | Path) -> Metadata:
    """Metadata from the header alone (no tensors). Raises CheckpointError."""
    return Metadata.from_strings(read_header(path).get("__metadata__", {}), path)
