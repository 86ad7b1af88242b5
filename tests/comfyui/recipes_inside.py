"""Recipes in ComfyUI's own objects: ComfyUI's interpreter runs this file for test_recipes_inside.py.

`recipes_inside.py FOLDER`: reads FOLDER/jobs.json, a list of {name, file, family, steps, seed, both}, and each file's
inputs; samples with OneStepRecipe and a guider, and where `both` says so with OneStepSample; writes latents.safetensors
with name -> the first latent and "name sample" -> the second, both as the net sees them.
"""

import json
from pathlib import Path

from inside_setup import ARGUMENTS, imported  # first: the imports below need comfy

# isort: split
import comfy.model_management as mm
import comfy.samplers
import comfy.sd
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(ARGUMENTS[0])
native, sample = imported("nodes.native"), imported("nodes.sample")


def load(name: str):
    """A MODEL as ComfyUI's own loader gives it; our files without what tells their recipe."""
    path = FOLDER / name
    if not name.startswith("unet"):
        return comfy.sd.load_diffusion_model_state_dict(load_file(path))
    model = native.load(path, [])[0]
    model.remove_attachments("onestep")
    return model


def conditioning(inputs: dict) -> list:
    return [[inputs["context"], {"pooled_output": inputs["pooled"]} if "pooled" in inputs else {}]]


def latents(model, inputs: dict, job: dict) -> tuple:
    noise, positive = inputs["noise"], conditioning(inputs)
    ready, sampler, sigmas = sample.OneStepRecipe.execute(model, job["family"], job["steps"]).args
    guider = comfy.samplers.CFGGuider(ready)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    first = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=job["seed"], disable_pbar=True)
    if not job["both"]:
        return (model.model.process_latent_in(first).contiguous(),)
    empty = {"samples": torch.zeros_like(noise)}
    second = sample.OneStepSample.execute(model, positive, empty, job["seed"], job["family"], job["steps"]).args[0]
    return tuple(model.model.process_latent_in(latent).contiguous() for latent in (first, second["samples"]))


results, loaded = {}, {}
for job in json.loads((FOLDER / "jobs.json").read_text()):
    if job["file"] not in loaded:
        mm.unload_all_models()
        loaded = {job["file"]: load(job["file"])}
    inputs = load_file(FOLDER / f"{job['file']}.inputs")
    for end, latent in zip(("", " sample"), latents(loaded[job["file"]], inputs, job)):
        results[job["name"] + end] = latent
save_file(results, FOLDER / "latents.safetensors")
