"""Diffusers folders: opened, described by their own configurations, and written with another net.

A folder that OneStep wrote has onestep.json beside model_index.json: the strings that a OneStep file has in its header.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic import write_beside, write_folder
from ..file.metadata import Metadata
from ..header import CheckpointError
from ..sample import trailing
from ..schedule import POWERS, from_spec

OURS = "onestep.json"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names -> ours
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
    """Whether it can be a model's name at the Hugging Face hub, org/model; a path that is there is none."""
    return not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None


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
    without = dict.fromkeys(name for name, kind in held.items() if name in UNUSED or kind == [None, None])
    if "safety_checker" in held:
        without["requires_safety_checker"] = False
    try:
        with quiet():
            return DiffusionPipeline.from_pretrained(
                path, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **without
            )
    except Exception as e:  # diffusers, transformers and tokenizers, each in its own way
        raise CheckpointError(f"{path}: diffusers cannot open it: {' '.join(str(e).split())}") from e


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
    """No bars of diffusers' and transformers' own inside."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    shown = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


# ------------------------------------------------------------------------------------------------- describing


def describe(path: Path, pipe: Any, spec: dict[str, Any], prediction: str) -> dict[str, Any]:
    """Fields of Metadata that a pipeline knows; steps and guidance are its call's own defaults."""
    vae, call = pipe.vae.config, inspect.signature(pipe.__call__).parameters
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
            raise CheckpointError(
                f"{path}: scheduler {key} {config.get(key)!r} is none of {', '.join(map(str, values))}."
            )
    spec = {k: config[k] for k in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    return {"kind": "ddpm", **spec}, PREDICTIONS[config["prediction_type"]]


# -------------------------------------------------------------------------------------------------- schedulers


def student_scheduler(meta: Metadata) -> Any:
    """The diffusers scheduler with which a pipeline calls a student as `distill sample` does: x0 at once, noised again
    to the next level. Raises CheckpointError for a prediction that diffusers' schedulers do not know."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

    spec, named = meta.schedule, {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if spec["kind"] == "flow" and meta.prediction == "flow":
        how = {"shift": spec.get("shift", 1.0), "num_train_timesteps": spec.get("num_train_timesteps", 1000)}
        return FlowMatchEulerDiscreteScheduler(**how, stochastic_sampling=True)
    if spec["kind"] != "ddpm" or meta.prediction not in named:
        raise CheckpointError(f"diffusers has no scheduler for a {meta.prediction} net on the schedule {spec['kind']}.")
    schedule, last = from_spec(spec), round(meta.t_in)
    abar = schedule.alpha(schedule.time(torch.arange(last + 1, dtype=torch.float64))) ** 2
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    # LCMScheduler counts from the last step it knows: one that ends at t_in starts there
    return LCMScheduler(
        num_train_timesteps=last + 1, original_inference_steps=last + 1, trained_betas=betas.tolist(),
        prediction_type=named[meta.prediction], clip_sample=False,
    )  # fmt: skip


def how_to_call(meta: Metadata) -> dict[str, Any]:
    """What diffusers' pipeline is to be called with, so that it samples as `distill sample` does."""
    baked = meta.guidance.get("baked")
    scale = meta.guidance.get("embedded", 0.0 if baked else meta.guidance["scale"])
    if not baked:
        return {"num_inference_steps": meta.steps, "guidance_scale": scale}
    schedule = from_spec(meta.schedule)
    times = torch.tensor(trailing(meta.steps), dtype=torch.float64) * float(schedule.time(meta.t_in))
    if meta.schedule["kind"] == "flow":  # its scheduler shifts them
        return {"sigmas": [round(t, 4) for t in times.tolist()], "guidance_scale": scale}
    if meta.steps == 1:
        return {"num_inference_steps": 1, "guidance_scale": scale}
    return {"timesteps": schedule.index(times).long().tolist(), "guidance_scale": scale}


# ---------------------------------------------------------------------------------------------------- writing


def write(
    path: Path, pipe: Any, source: Path | None, main: str, net: nn.Module, scheduler: Any, meta: Metadata,
    dtype: torch.dtype,
) -> Path:  # fmt: skip
    """A diffusers folder of `pipe` with another net (its part `main`) and scheduler. Parts are copied from `source`,
    where there is one. Raises CheckpointError where `path` is a folder of someone else's."""
    if path.is_dir() and any(path.iterdir()) and not (path / OURS).is_file():
        raise CheckpointError(f"{path}: a folder that OneStep did not write. Name another, or move it away.")

    def fill(new: Path) -> None:
        if source is not None:
            held = copy_parts(source, new, (main, "scheduler"))
            held["scheduler"] = ["diffusers", type(scheduler).__name__]
            (new / "model_index.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
        else:
            pipe.register_modules(scheduler=scheduler)
            for name, part in pipe.components.items():
                if name != main and part is not None:
                    part.save_pretrained(new / name)
            pipe.save_config(new)
        scheduler.save_pretrained(new / "scheduler")
        save_net(new / main, net, dtype)
        (new / OURS).write_text(json.dumps(meta.to_strings(), indent=1) + "\n", encoding="utf-8")
        (new / "README.md").write_text(card(meta, index(new)["_class_name"]), encoding="utf-8")

    path.parent.mkdir(parents=True, exist_ok=True)
    write_folder(path, fill)
    return path


def copy_parts(source: Path, new: Path, without: tuple[str, ...]) -> dict[str, Any]:
    """Copy a folder's parts but some, without pickles; its index, for the new folder."""
    held = {k: v for k, v in index(source).items() if k != "_name_or_path"}
    for name in held.keys() & UNUSED:
        held[name] = [None, None]
    for name, kind in held.items():
        if name not in without and isinstance(kind, list) and kind[0] is not None:
            shutil.copytree(source / name, new / name, ignore=shutil.ignore_patterns("*.bin", "*.ckpt", "*.msgpack"))
    return held


def save_net(folder: Path, net: nn.Module, dtype: torch.dtype) -> None:
    """A diffusers net's configuration and weights, in `dtype`, without a copy of the net in memory."""
    from safetensors.torch import save_file

    net.save_config(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a path of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {
        k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype) for k, v in net.state_dict().items()
    }
    weights = {k: v.contiguous() for k, v in weights.items()}
    file = folder / "diffusion_pytorch_model.safetensors"
    write_beside(file, lambda temporary: save_file(weights, temporary, {"format": "pt"}))


def card(meta: Metadata, pipeline: str) -> str:
    """README.md of a folder: what it is, what it was made of, and how it is called."""
    baked = meta.guidance.get("baked")
    call = ", ".join(f"{name}={value}" for name, value in how_to_call(meta).items())
    what = f"A student of {meta.teacher}, made by {meta.method}" if baked else "A model"
    rows = {"teacher": meta.teacher, "method": meta.method, "options": meta.config, "figures": meta.metrics}
    table = [f"| {k} | {json.dumps(v) if isinstance(v, dict) else v} |" for k, v in rows.items() if v]
    table.append(f"| called at | {meta.t_in:g}, as the net counts timesteps; {meta.prediction} prediction |")
    return "\n".join(
        [
            "---", "library_name: diffusers", f"license: {json.dumps(meta.license)}", "---", "",
            f"{what}, written by OneStep. Sample it with its own scheduler:", "",
            "```python", "from diffusers import DiffusionPipeline", "",
            'pipe = DiffusionPipeline.from_pretrained("this folder")',
            f'picture = pipe("a prompt", {call}).images[0]  # {pipeline}', "```", "",
            "| | |", "|---|---|", *table, "",
        ]
    )  # fmt: skip
