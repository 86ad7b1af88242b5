"""What is to be quantized: a safetensors file, or a folder of diffusers' or transformers', tensor by tensor.

Tensors are read with plain reads, not mapped, so that a large model never counts as resident memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..header import CheckpointError, read_header
from ..packed.weight import MARK, group_for, narrowed

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

PARTS = {
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.": "text",
    "conditioner.": "text",
    "text_encoders.": "text",
    "text_encoder.": "text",
}
"""prefixes of a full checkpoint's keys; a file without any of them is one part as a whole"""
TEXT_ALONE = re.compile(
    r"(^|\.)(text_model\.encoder\.layers|encoder\.block\.0\.layer\.0\.SelfAttention|shared\.weight)"
)
VAE_ALONE = re.compile(r"^(decoder\.(conv_in|mid)|encoder\.(conv_in|mid)|post_quant_conv)")

EMBEDDING = re.compile(
    r"(^|\.)(token_embedding|position_embedding|embed_tokens|shared|relative_attention_bias|word_embeddings|"
    r"position_embeddings|token_type_embeddings|class_embedding|wte|wpe|lm_head)\.weight$"
)
"""tables that are looked up, not multiplied with (and output heads tied to them): dense, and no matrix weights"""
ENDS = re.compile(
    r"^(conv_in|conv_out|input_blocks\.0\.0|out\.2|x_embedder|img_in|patch_embed\w*|pos_embed|proj_in|proj_out|"
    r"final_layer|head)\."
)
"""the first and the last layer of U-Nets and transformers: dense, since they cost little and matter most"""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in which file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def numel(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)


@dataclass
class Source(Mapping):
    """A model's tensors by key, read when asked for. `folder` is set where it came as a folder with a config."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    whole: str = ""
    """which part it is, where the keys have no prefixes; "" finds out from the keys"""

    def __getitem__(self, key: str) -> Tensor:
        e = self.entries[key]
        if e.dtype not in DTYPES:
            raise CheckpointError(f"{e.file}: {key} is of type {e.dtype!r}, which this torch lacks. Convert it to F16.")
        data = torch.empty(e.size, dtype=torch.uint8)
        with e.file.open("rb") as f:
            f.seek(e.start)
            got = f.readinto(data.numpy()) if e.size else 0
        if got != e.size:
            raise CheckpointError(f"{e.file}: truncated at {key}. Download it again.")
        return data.view(DTYPES[e.dtype]).view(e.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def is_onestep(self) -> bool:
        """Whether it is a file of the contract."""
        return "onestep.version" in self.metadata

    @property
    def card(self) -> dict[str, str]:
        """The metadata without the figures: those were measured on other weights than a quantized file holds."""
        return {k: v for k, v in self.metadata.items() if k != "metrics" or not self.is_onestep}

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(e.size for e in self.entries.values())

    def part(self, key: str) -> tuple[str, str]:
        """(unet, text, vae or other; the key within it)."""
        for prefix, name in PARTS.items():
            if key.startswith(prefix):
                return name, key[len(prefix) :]
        return self.whole, key

    def __post_init__(self):
        if any(k.startswith(p) for p in PARTS for k in self.entries):
            self.whole = "other"
        elif not self.whole:
            kinds = ((TEXT_ALONE, "text"), (VAE_ALONE, "vae"))
            self.whole = next((name for kind, name in kinds if any(map(kind.search, self.entries))), "unet")


# ---------------------------------------------------------------------------------------------------- opening


def open_source(path: str | Path) -> Source:
    """A safetensors file; a folder with config.json and weights; or a pipeline's folder, of which the U-Net (or
    transformer) is taken. Raises CheckpointError naming the path and the cure."""
    path = Path(path)
    source = _folder(path) if path.is_dir() else Source(path, *_file(path))
    marked = next((k for k in source if k.endswith("." + MARK)), None)
    if marked is not None:
        raise CheckpointError(f"{path}: is quantized already ({marked}). Quantize the original model.")
    return source


def _file(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    header = read_header(path)
    base = 8 + int.from_bytes(path.open("rb").read(8), "little")
    entries = {}
    metadata = header.pop("__metadata__", {})
    for key, spec in header.items():
        start, end = spec["data_offsets"]
        entry = entries[key] = Entry(path, spec["dtype"], tuple(spec["shape"]), base + start, end - start)
        width = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        if width is not None and entry.numel * width != entry.size:
            raise CheckpointError(f"{path}: the header gives {key:.200} {entry.size} bytes. Download it again.")
    return entries, metadata


def _folder(folder: Path) -> Source:
    if (folder / "model_index.json").is_file():
        inner = next((folder / n for n in ("unet", "transformer") if (folder / n).is_dir()), None)
        if inner is None:
            raise CheckpointError(
                f"{folder}: a pipeline without unet/ or transformer/. Name the folder of the part itself."
            )
        folder = inner
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json there. Name a safetensors file, a diffusers folder or one of its parts."
        )
    entries: dict[str, Entry] = {}
    for file in shards(folder):
        entries |= _file(file)[0]
    diffusers = "_class_name" in read_json(folder / "config.json")
    return Source(folder, entries, {}, folder, "" if diffusers else "text")


def shards(folder: Path) -> list[Path]:
    """A part's weight files: those of its index, or the one safetensors file (without a variant, of two)."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"), key=lambda p: len(p.name))), None)
    if index is not None:
        names = read_json(index).get("weight_map")
        names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else [""]
        if any(Path(n).name != n or not n for n in names):
            raise CheckpointError(f"{index}: names files outside its folder. Download the model again.")
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"), key=lambda p: (len(p.name), p.name))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors file there. Save the model with safe_serialization=True.")
    return files[:1]


def read_json(path: Path) -> dict:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read ({e}). Download the model again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is no JSON object. Download the model again.")
    return found


# ------------------------------------------------------------------------------------------------ what to quantize


def layers_of(source: Source, parts: tuple[str, ...], group_size: int, keep: tuple[str, ...] = ()) -> dict[str, str]:
    """Every matrix weight of the chosen parts -> why it stays dense, "" where it is to be quantized. Keys are layers'
    names, without `.weight`."""
    found = {}
    for key, entry in source.entries.items():
        name, inner = source.part(key)
        if name not in parts or not key.endswith(".weight") or len(entry.shape) not in (2, 4):
            continue
        layer = key.removesuffix(".weight")
        if EMBEDDING.search(inner):
            continue
        if name == "unet" and ENDS.match(inner):
            found[layer] = "first or last layer"
        elif name == "text" and ".resblocks." in inner:
            found[layer] = "OpenCLIP's layout, which loaders rename key by key"
        elif any(re.search(pattern, layer) for pattern in keep):
            found[layer] = "asked for"
        elif not entry.dtype.startswith(("F", "BF")):
            found[layer] = f"is {entry.dtype}"
        elif group_for(entry.shape[1], group_size) is None:
            found[layer] = f"{entry.shape[1]} input channels make no group"
        else:
            found[layer] = ""
    return found


def as_stored(t: Tensor) -> Tensor:
    """What stays dense: fp32 as fp16 where that holds it, else as it is."""
    return narrowed(t) if t.dtype == torch.float32 else t


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 error of a against b."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
