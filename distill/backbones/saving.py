"""What is written of a model: OneStep files, files for ComfyUI's loaders, diffusers folders that sample as we do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import of as adapters_of
from ..atomic import write_beside, write_folder
from ..file import checkpoint, lora
from ..file.metadata import Metadata
from ..file.workflow import student_graph
from ..header import CheckpointError
from ..layouts import Weights
from ..packed.weight import narrowed
from ..schedule import from_spec
from .folder import HALF, OURS, PREDICTIONS, UNUSED, index


class Saving:
    """The half of a Backbone that writes. A family answers build_pipeline and comfy_weights, where there are such."""

    main: str
    in_comfyui = False
    """Whether there are OneStep files of this family, for OneStep Load Student. Others are diffusers folders."""
    comfy_loras = True
    """Whether ComfyUI's LoraLoader knows the layers of this family's nets."""
    stored = torch.float16
    """In what a student's weights are stored."""
    parts: dict[str, nn.Module]
    meta: Metadata
    name: str
    pipeline: Any
    source: Path | None

    def build_pipeline(self) -> Any:
        """diffusers' pipeline of a model that came from a file. Raises CheckpointError where diffusers has none."""
        raise CheckpointError(f"{self.name}: diffusers has no pipeline of this kind. Export another format.")

    def comfy_weights(self, net: nn.Module) -> Weights:
        """Weights of one file for ComfyUI's own loaders, under the names that they know. Raises CheckpointError where
        ComfyUI knows no such model."""
        raise CheckpointError(f"{self.name}: ComfyUI's own loaders know no single file of this kind. Export a folder.")

    def save(self, path: str | Path, net: nn.Module, dtype: torch.dtype = torch.float16, **changes: Any) -> Path:
        """Write a OneStep file of `net` with this model's other parts and way of being called.

        changes: fields of Metadata. Raises CheckpointError where one cannot be, or there are no such files.
        """
        if not self.in_comfyui:
            raise CheckpointError(f"{self.name}: there are no OneStep files of this family. Export a diffusers folder.")
        return checkpoint.write(path, self.pack(net, replace(self.meta, **changes)), dtype)

    def pack(self, net: nn.Module, meta: Metadata) -> checkpoint.Checkpoint:
        """`net` with this model's other parts as a OneStep file holds them."""
        weights = {name: dict(module.state_dict()) for name, module in self.parts.items()}
        weights[self.main] = dict(net.state_dict())
        return checkpoint.pack(checkpoint.Pipeline(weights, meta))

    def save_folder(self, path: str | Path, net: nn.Module, dtype: torch.dtype | None = None, **changes: Any) -> Path:
        """Write a diffusers folder: `net` with this model's other parts, the scheduler with which diffusers samples as
        `sample` does, onestep.json with the metadata (changes: fields of it), and a README.md that says all this.

        Raises CheckpointError where diffusers has no such pipeline, or the folder is someone else's.
        """
        meta = replace(self.meta, **changes)
        pipe = self.build_pipeline() if self.pipeline is None else self.pipeline
        baked = meta.guidance.get("baked")
        scheduler = scheduler_of(meta) if baked or self.pipeline is None else pipe.scheduler
        return write(Path(path), pipe, self.source, self.main, net, scheduler, meta, dtype or self.stored)

    def save_comfy(self, path: str | Path, net: nn.Module, dtype: torch.dtype | None = None, **changes: Any) -> Path:
        """Write one safetensors file that ComfyUI's own loaders open: `net` with what else they look for in it. The
        metadata (changes: fields of it) says how it is to be sampled. Raises CheckpointError where they know none."""
        strings = replace(self.meta, **changes | {"workflow": None}).to_strings()
        strings.pop("onestep.version")  # it is no OneStep file
        return checkpoint.store(path, self.comfy_weights(net), strings, dtype or self.stored)

    def graph(self, path: str | Path, prompt: str | None = None) -> dict[str, Any] | None:
        """A ComfyUI graph for a student's file; prompt: see file.workflow.student_graph."""
        return student_graph(Path(path).name, self.shape(1)[-1] * self.meta.latent["factor"], prompt)

    def save_student(self, path: str | Path, net: nn.Module, *, base: str | None = None, **changes: Any) -> Path:
        """Write a one-step student of this model, whose guidance is in its weights unless `changes` say otherwise: a
        OneStep file with a graph that opens it in ComfyUI; of a family without such files a diffusers folder; of a
        net with adapters a LoRA file, `base` being the name of the model that they add to, by default this one's.
        Returns where it is."""
        changes = self.student(**changes)
        if (adapters := adapters_of(net)) is not None:
            meta = replace(self.meta, **changes)
            return lora.write(path, lora.of_student(adapters, base or self.name, self.main, meta))
        path = self.student_path(path)
        if not self.in_comfyui:
            return self.save_folder(path, net, **changes)
        return self.save(path, net, **{"workflow": self.graph(path, "")} | changes)

    def student(self, **changes: Any) -> dict[str, Any]:
        """What of Metadata is another in a student of this model; see save_student."""
        student = {"steps": 1, "times": None, "teacher": self.name, "metrics": {}, "quantization": None, "config": {}}
        return student | changes | {"guidance": {**self.meta.guidance, "baked": True, **changes.get("guidance", {})}}

    def check_student(self, lora: bool = False, **changes: Any) -> None:
        """Raise CheckpointError where a student with these fields of Metadata, full or a LoRA, could not be saved."""
        meta = replace(self.meta, **self.student(**changes))
        meta.to_strings()
        if not self.in_comfyui and not lora:
            scheduler_of(meta)

    def student_path(self, path: str | Path) -> Path:
        """Where a student is saved: at the path; of a family without files, in a folder of its name without ending."""
        return Path(path) if self.in_comfyui else Path(path).with_suffix("")


# -------------------------------------------------------------------------------------------------- schedulers


def scheduler_of(meta: Metadata) -> Any:
    """The diffusers scheduler with which a pipeline samples as `distill sample` does: a student's x0 at once, noised
    again to the next level; of a teacher from a file DPM-Solver++, on a flow schedule Euler. Raises CheckpointError for
    a prediction or a start that diffusers' schedulers do not know."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

    spec, named = meta.schedule, {ours: theirs for theirs, ours in PREDICTIONS.items()}
    baked = bool(meta.guidance.get("baked"))
    if spec["kind"] == "flow" and meta.prediction == "flow":
        last = float(from_spec(spec).index(torch.ones(())))
        if baked and meta.t_in < last:  # there its noise is of less than unit variance (sample.one_step)
            called = f"this student of a flow is called at {meta.t_in:g}, below the noisiest timestep, {last:g}"
            raise CheckpointError(f"diffusers starts a flow from noise of unit variance; {called}. Train one at that.")
        how = {"shift": spec.get("shift", 1.0), "num_train_timesteps": spec.get("num_train_timesteps", 1000)}
        return FlowMatchEulerDiscreteScheduler(**how, stochastic_sampling=baked)
    if spec["kind"] != "ddpm" or meta.prediction not in named:
        raise CheckpointError(f"diffusers has no scheduler for a {meta.prediction} net on the schedule {spec['kind']}.")
    schedule, last = from_spec(spec), round(meta.t_in)
    abar = schedule.alpha(schedule.time(torch.arange(last + 1, dtype=torch.float64))) ** 2
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    how = {"trained_betas": betas.tolist(), "prediction_type": named[meta.prediction]}
    how["steps_offset"] = 1  # nothing to these schedulers, but Stable Diffusion's pipelines warn of any other
    if not baked:
        return DPMSolverMultistepScheduler(last + 1, **how, timestep_spacing="trailing")
    # LCMScheduler counts from the last step it knows: one that ends at t_in starts there
    return LCMScheduler(last + 1, **how, original_inference_steps=last + 1, clip_sample=False)


def how_to_call(meta: Metadata) -> dict[str, Any]:
    """What diffusers' pipeline is to be called with, so that it samples as `distill sample` does."""
    baked = meta.guidance.get("baked")
    scale = meta.guidance.get("embedded", 0.0 if baked else meta.guidance["scale"])
    if not baked:
        return {"num_inference_steps": meta.steps, "guidance_scale": scale}
    if meta.schedule["kind"] == "flow":  # its scheduler shifts them
        return {"sigmas": [round(t, 6) for t in meta.calls(meta.steps)], "guidance_scale": scale}
    if meta.steps == 1:
        return {"num_inference_steps": 1, "guidance_scale": scale}
    return {"timesteps": [round(i) for i in meta.timesteps(meta.steps)], "guidance_scale": scale}


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
        (new / "README.md").write_text(card(meta, index(new)), encoding="utf-8")

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
            one_precision(new / name)
    return held


def one_precision(folder: Path) -> None:
    """Of weights that lie there in half and in full precision keep the full ones; half ones alone get plain names."""
    half = [f for f in folder.iterdir() if HALF in f.name]
    alone = len(half) == sum(HALF in f.name or f.suffix == ".safetensors" for f in folder.iterdir())
    for file in half:
        if not alone:
            file.unlink()
            continue
        if file.suffix == ".json":  # names the shards
            file.write_text(file.read_text(encoding="utf-8").replace(HALF, ""), encoding="utf-8")
        file.rename(folder / file.name.replace(HALF, ""))


def save_net(folder: Path, net: nn.Module, dtype: torch.dtype) -> None:
    """A diffusers net's configuration and weights, in `dtype`, without a copy of the net in memory."""
    from safetensors.torch import save_file

    net.save_config(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a path of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {k: v.detach() for k, v in net.state_dict().items()}
    weights = {k: (narrowed(v, dtype) if v.is_floating_point() else v).cpu().contiguous() for k, v in weights.items()}
    file = folder / "diffusion_pytorch_model.safetensors"
    write_beside(file, lambda temporary: save_file(weights, temporary, {"format": "pt"}))


def card(meta: Metadata, held: dict[str, Any]) -> str:
    """README.md of a folder with this index: what it is, what it was made of, and how it is opened and called."""
    absent = "".join(f", {n}=None" for n, kind in held.items() if kind == [None, None] and n not in UNUSED)
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
            f'pipe = DiffusionPipeline.from_pretrained("this folder"{absent})',
            f'picture = pipe("a prompt", {call}).images[0]  # {held["_class_name"]}', "```", "",
            "| | |", "|---|---|", *table, "",
        ]
    )  # fmt: skip
