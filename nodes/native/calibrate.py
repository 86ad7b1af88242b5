"""What flows into the layers of a model while ComfyUI makes pictures with it: calibration without diffusers.

A OneStep file says how it is run. Any other is run as the graph has it: the MODEL and CLIP that were loaded from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...distill.file.metadata import Metadata
from ...distill.layouts import TEXT, UNET
from ...distill.quantize.calibrate import LayerStats, collect
from ...distill.quantize.options import Quantize
from ...distill.quantize.prompts import given_prompts
from ...distill.quantize.source import Source, open_source, relative
from ...distill.schedule import from_spec
from ...distill.tutorial import shapes
from ...distill.tutorial.prompts import is_vocabulary
from ..recipe import FewStepSampler, sigmas
from . import load

LAYERS = torch.nn.Linear | torch.nn.Conv2d
SIDE, DRAWN = 64, 4
"""of the latents where none is connected; pictures where no prompts are given"""
STRANGE = 0.2
"""relative difference of two weights that are not one file's: 4 bits differ by half of it, most LoRAs by less"""
Progress = Callable[[int, int, str], None]


def calibrate(
    path: Path, meta: Metadata, prompts: list[str], text: bool, progress: Progress, seed: int = 0
) -> dict[str, LayerStats]:
    """Key of each layer in the file -> its inputs, over one picture a prompt, made as the file's recipe says.

    text: the text encoder's layers, too.
    """
    model, clip, _ = load(path, [], disable_dynamic=True)
    nets = torch.nn.ModuleDict({"unet": model.model.diffusion_model})
    keys = {"unet.": UNET}
    if text:
        nets["text"] = getattr(clip.cond_stage_model, clip.cond_stage_model.clip).transformer
        keys["text."] = TEXT
    names = {}
    for name, module in nets.named_modules():
        if isinstance(module, LAYERS):
            part = next(p for p in keys if name.startswith(p))
            names[name] = keys[part] + name[len(part) :]

    def run() -> None:
        for i, prompt in enumerate(prompts):
            progress(i, len(prompts), "calibrating")
            picture(model, clip, meta, prompt, seed + i)

    return collect(nets, names, run, seed=seed)


def picture(model, clip, meta: Metadata, prompt: str, seed: int) -> None:
    """Sample one, the way the file recommends; what comes out is of no interest."""
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(p)) for p in (prompt, ""))
    size = meta.architecture["unet"].get("sample_size") or 32  # one number, or height and width
    latent = torch.zeros(1, meta.latent["channels"], *([size, size] if isinstance(size, int) else size))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    student = meta.guidance.get("baked")
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive} | ({} if student else {"negative": negative}))
    guider.set_cfg(1.0 if student else meta.guidance["scale"])
    sampler = FewStepSampler() if student else comfy.samplers.sampler_object("euler")
    guider.sample(noise, latent, sampler, sigmas(meta, meta.steps), disable_pbar=True, seed=seed)


def default_prompts(meta: Metadata, seed: int = 0) -> tuple[list[str], str]:
    """(64 for one step, 16 for a teacher's many; what to call them): of the tutorial's world for its own models."""
    count = 64 if meta.guidance.get("baked") else 16
    if is_vocabulary(meta.text_encoder["tokenizer"].get("model", {}).get("vocab", ())):
        return shapes.sample_prompts(count, torch.Generator().manual_seed(seed)), f"{count} prompts"
    return given_prompts(Quantize(), count)


def said(meta: Metadata, prompts: str) -> str:
    """What the report says about it; prompts: what to call them."""
    t = float(from_spec(meta.schedule).time(meta.t_in))
    where = f"t = {meta.t_in:g}" if meta.steps == 1 else f"{meta.steps} steps from time {t:.3g}"
    return f"calibrated on {prompts} at {where}, in ComfyUI"


# ------------------------------------------------------------------------------------- files that do not say how


@dataclass(frozen=True)
class Connected:
    """What a graph runs a file with."""

    model: ModelPatcher | None
    clip: comfy.sd.CLIP | None
    latent: dict[str, torch.Tensor] | None
    """of the size to draw at"""
    steps: int
    cfg: float

    def calibrate(
        self, path: Path, prompts: list[str], text: bool, progress: Progress, seed: int = 0
    ) -> dict[str, LayerStats]:
        """Key of each layer in the file -> its inputs, over one picture a prompt, or one text where there is no MODEL.

        Raises ValueError, naming the inputs and the cure, where they are not what the file holds.
        """
        source = open_source(path)
        text = text or source.whole == "text"
        if self.clip is None or (self.model is None and source.whole != "text"):
            raise ValueError(f"{path.name} is run on prompts with its MODEL and its CLIP: connect both, or neither.")
        nets = torch.nn.ModuleDict({"text": self.clip.cond_stage_model} if text else {})
        if self.model is not None:
            nets["unet"] = self.model.model.diffusion_model
        names = layers_in(source, nets, self.model)
        first = next(iter(names), None)
        if first is None or differs(nets.get_submodule(first), source[f"{names[first]}.weight"]):
            raise ValueError(f"MODEL and CLIP are not what {path.name} holds: connect the loader of that very file.")
        prompts = prompts or given_prompts(Quantize(), DRAWN)[0]

        def run() -> None:
            for i, prompt in enumerate(prompts):
                progress(i, len(prompts), "calibrating")
                self.run(prompt, seed + i)

        return collect(nets, names, run, seed=seed)

    def run(self, prompt: str, seed: int) -> None:
        """Encode it and, with a MODEL, make a picture."""
        positive, negative = (self.clip.encode_from_tokens_scheduled(self.clip.tokenize(p)) for p in (prompt, ""))
        if self.model is None:
            return
        latent = torch.zeros(1, 4, SIDE, SIDE) if self.latent is None else torch.zeros_like(self.latent["samples"][:1])
        latent = comfy.sample.fix_empty_latent_channels(self.model, latent)
        noise = comfy.sample.prepare_noise(latent, seed)
        how = (self.steps, self.cfg, "euler", "normal", positive, negative, latent)
        comfy.sample.sample(self.model, noise, *how, disable_pbar=True, seed=seed)

    def said(self, prompts: int) -> str:
        """What the report says about it; prompts: how many were given."""
        how = f" at {self.steps} steps" if self.model is not None else ""
        return f"calibrated on {prompts or f'{DRAWN} general'} prompts{how}, in ComfyUI"


def layers_in(source: Source, nets: torch.nn.ModuleDict, model: ModelPatcher | None) -> dict[str, str]:
    """Module in `nets` -> the layer of the file that it holds: of the same name in ComfyUI's words, and of one shape.

    What ComfyUI joins of several layers, as q, k and v of diffusers' transformers, is in neither.
    """
    words = {} if model is None else comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    modules = {n: sides(m.weight.shape) for n, m in nets.named_modules() if isinstance(m, LAYERS)}
    found = {}
    for key, entry in source.entries.items():
        part, inner = source.part(key)
        if not key.endswith(".weight") or part not in nets or len(entry.shape) not in (2, 4):
            continue
        inner = words.get(inner, inner).removesuffix(".weight")
        fit = [f"unet.{inner}"] if part == "unet" else [n for n in modules if f".{n}".endswith(f".{inner}")]
        fit = [n for n in fit if modules.get(n) == sides(entry.shape)]
        if len(fit) == 1 and fit[0].startswith(part):
            found[fit[0]] = key.removesuffix(".weight")
    return found


def sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape; that of a 1x1 convolution is a matrix's."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def differs(module: torch.nn.Module, weight: torch.Tensor) -> bool:
    """Whether a module's weight is another than the file's, not just rounded or patched."""
    return relative(module.weight.float().cpu().reshape(weight.shape), weight.float()) > STRANGE
