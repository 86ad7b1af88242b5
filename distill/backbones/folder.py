"""Diffusers folders: opened, described by their own configurations, and written with another net.

A folder that OneStep wrote has onestep.json beside model_index.json: the strings that a OneStep file has in its header.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..file.metadata import Metadata
from ..header import CheckpointError
from ..schedule import POWERS, from_spec

OURS = "onestep.json"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names -> ours
HALF = ".fp16"
"""In the names of files that hold half precision, beside others or alone."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


# ---------------------------------------------------------------------------------------------------- opening


def index(path: Path) -> dict[str, Any]:
    """A folder's model_index.json, in which a text encoder that is not there is none. Raises CheckpointError where
    there is no such file, or it is not a pipeline's."""
    file = path / "model_index.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no model_index.json in it. Give a diffusers folder, or a OneStep file.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found["_class_name"], str):
            words = [n for n in found if n.startswith(("text_encoder", "tokenizer")) and not (path / n).is_dir()]
            return found | {name: [None, None] for name in words}
    except (ValueError, TypeError, KeyError):
        pass
    raise CheckpointError(f"{file}: not a pipeline's index. Save it again with save_pretrained.")


def is_hub_name(name: str | Path) -> bool:
    """Whether it can be a model's name at the Hugging Face hub, org/model: no path that is there, no file."""
    like = re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.safetensors)(?<!\.gguf)", str(name))
    return like is not None and not Path(name).exists()


def from_hub(name: str) -> Path:
    """The folder of a model of the hub in this machine's cache, downloaded if need be. Raises CheckpointError where it
    is not to be had."""
    from diffusers import DiffusionPipeline

    logging.disable(logging.WARNING)  # what they tell of a missing network, our error does
    try:
        with quiet():
            return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as e:  # no network, no such model, no permission: each in its own way
        why = " ".join(str(e).split())[:200]
        raise CheckpointError(
            f"{name}: no such file or folder here, and not to be had from the Hugging Face hub ({why}). Offline: put "
            f"the model's diffusers folder (model_index.json and what it names) on this machine, and give its path."
        ) from e
    finally:
        logging.disable(logging.NOTSET)


def open_pipeline(path: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline of a folder, without what judges or describes pictures. Raises CheckpointError."""
    from diffusers import DiffusionPipeline

    held = index(path)
    how = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    how |= dict.fromkeys(name for name, kind in held.items() if name in UNUSED or kind == [None, None])
    if "safety_checker" in held:
        how["requires_safety_checker"] = False
    names = [f.name for f in path.glob("*/*.safetensors")]
    if names and all(HALF in name for name in names):
        how["variant"] = HALF.strip(".")
    try:
        with quiet():
            pipe = DiffusionPipeline.from_pretrained(path, **how)
    except Exception as e:  # diffusers, transformers and tokenizers, each in its own way
        raise CheckpointError(f"{path}: diffusers cannot open it: {' '.join(str(e).split())}") from e
    for name, part in pipe.components.items():  # diffusers only tells of weights that it did not find
        if isinstance(part, nn.Module) and (lacking := [k for k, p in part.named_parameters() if p.is_meta]):
            raise CheckpointError(f"{path}: its {name} lacks {lacking[0]!r}. Download it again.")
    return pipe


def takes_loras(pipelines: Iterable[str]) -> bool:
    """Whether some of diffusers' pipelines has `load_lora_weights`."""
    import diffusers

    return any(hasattr(getattr(diffusers, name), "load_lora_weights") for name in pipelines)


def read_ours(path: Path) -> Metadata | None:
    """What OneStep wrote into a folder; None where it did not. Raises CheckpointError where it is damaged."""
    file = path / OURS
    if not file.is_file():
        return None
    try:
        strings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{file}: no JSON ({e}). Export the folder again.") from None
    if not isinstance(strings, dict) or not all(isinstance(v, str) for v in strings.values()):
        raise CheckpointError(f"{file}: not what OneStep writes. Export the folder again.")
    return Metadata.from_strings(strings, file)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of diffusers' and transformers' own inside, nor diffusers' advice to its callers."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    shown = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


# ------------------------------------------------------------------------------------------------- describing


def describe(path: Path, pipe: Any, spec: dict[str, Any], prediction: str) -> dict[str, Any]:
    """Fields of Metadata that a pipeline knows; steps and guidance are its call's own defaults. Raises CheckpointError
    for a net that takes more than a latent, and latents that are scaled otherwise."""
    vae, call = pipe.vae.config, inspect.signature(pipe.__call__).parameters
    unet = pipe.components.get("unet")
    if unet is not None and unet.config.in_channels != vae.latent_channels:
        takes = f"its unet takes {unet.config.in_channels} channels, its vae makes {vae.latent_channels}"
        raise CheckpointError(f"{path}: {takes}: made for inpainting or editing, of which there is no teacher here.")
    if vae.get("latents_mean") is not None:
        raise CheckpointError(f"{path}: its vae normalises each channel of latents (latents_mean), unknown here.")
    card = path / "README.md"
    licence = re.search(r"^license: *(\S+)", card.read_text("utf-8", "replace"), re.M) if card.is_file() else None
    latent = {"channels": vae.latent_channels, "scale": vae.scaling_factor, "shift": vae.get("shift_factor") or 0.0}
    return {
        "prediction": prediction,
        "schedule": spec,
        "t_in": float(from_spec(spec).index(torch.ones(()))),
        "latent": latent | {"factor": pipe.vae_scale_factor},
        "steps": call["num_inference_steps"].default,
        "guidance": {"scale": call["guidance_scale"].default, "baked": False},
        "license": licence.group(1) if licence else "see the teacher's",
    }


def noise(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A scheduler's configuration -> (what `from_spec` takes, what the net predicts). Raises CheckpointError for one
    whose noise levels are not known here."""
    name, steps = str(config.get("_class_name")), config.get("num_train_timesteps")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return {"kind": "flow", "shift": shift, "num_train_timesteps": steps}, "flow"
    known = {
        "beta_schedule": POWERS,
        "prediction_type": PREDICTIONS,
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (None, False),
    }
    for key, values in known.items():
        if config.get(key) not in values:
            listed = ", ".join(map(str, values))
            raise CheckpointError(f"{path}: its scheduler's {key} {config.get(key)!r} is not one of {listed}.")
    spec = {k: config[k] for k in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    return {"kind": "ddpm", **spec}, PREDICTIONS[config["prediction_type"]]
