"""Which recipe a MODEL wants: told by the user, by what OneStep wrote into its file, or by its files' names."""

from __future__ import annotations

from typing import NamedTuple

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..distill.file.metadata import Metadata, described
from ..distill.recipes.recipe import Recipe, find, of_file, recipes
from .recipe import KEY, FewStepSampler, levels, patched

AUTO = "auto"
CHOSEN = "onestep.chosen"
"""what OneStepRecipe attaches to its MODEL: (recipe, steps), for nodes behind it that ask for no family"""
HIDDEN = [io.Hidden.unique_id, io.Hidden.dynprompt]
FOLDERS = ("checkpoints", "diffusion_models", "loras")
ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


class Prepared(NamedTuple):
    """What sampling takes."""

    model: ModelPatcher
    sampler: FewStepSampler
    sigmas: torch.Tensor
    recipe: Recipe
    said: str
    """for the user: which recipe, why, and what it asks for"""


def family_input() -> io.Combo.Input:
    return io.Combo.Input(
        "family",
        options=[AUTO, *recipes()],
        default=AUTO,
        optional=True,
        tooltip="How the model is to be called. auto: as its OneStep file says, or as its file's name or a LoRA's "
        "on the way tells; the node shows what it took. Otherwise one of the public few-step models.",
    )


def steps_input(default: str) -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=50,
        optional=True,
        tooltip=f"How often the model is called. 0: {default}. A number that the model was not made for is refused.",
    )


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def prepare(model: ModelPatcher, family: str = AUTO, steps: int = 0, hidden=None, least: bool = False) -> Prepared:
    """A MODEL and what its recipe makes of it.

    steps: 0 takes the number in the file's name, else the recommended one; least: for a teacher of OneStep, one.
    hidden: a node's, with its id and the graph. Raises ValueError naming the cure where no recipe is known, where the
    MODEL is of another architecture, or for a number of steps it does not take.
    """
    meta, chosen = model.get_attachment(KEY), model.get_attachment(CHOSEN)
    base = type(model.model.model_config).__name__
    if family != AUTO:
        recipe, why = recipes()[family], "chosen"
        usual = named_steps(recipe, base, hidden)
        check_base(recipe, base)
    elif chosen is not None:
        (recipe, usual), why = chosen, "what OneStep Recipe says"
    elif meta is not None:
        recipe, why = of_file(meta), "what its file says"
        usual = 1 if least and meta.method == "teacher" else recipe.steps
    else:
        recipe, name, usual = search(files(hidden), base)
        why = f"told by {name}"
    steps = steps or usual
    changed = patched(model, recipe)
    sigmas = levels(recipe, steps, changed.get_model_object("model_sampling"))
    return Prepared(changed, FewStepSampler.of(recipe), sigmas, recipe, describe(recipe, steps, why))


def search(names: list[str], base: str) -> tuple[Recipe, str, int]:
    """The nearest file that tells a recipe, by what OneStep wrote into it or by its name: (recipe, file, steps)."""
    for name in names:
        meta = written(name)
        if meta is not None:
            return of_file(meta), name, meta.steps
        found = find([name], base)
        if found is not None:
            return found
    found = find([], base)
    if found is None:
        seen = f"The files it comes from are {', '.join(names)}. " if names else ""
        raise ValueError(
            f"This MODEL has no OneStep recipe. {seen}Choose its family, here or on a OneStep Recipe before this node, "
            "load it with OneStep Load Student if it is a OneStep file, or sample it with KSampler instead."
        )
    return found


def written(name: str) -> Metadata | None:
    """What OneStep wrote into a file of ComfyUI's folders: a student may be in a file for ComfyUI's own loaders."""
    paths = (folder_paths.get_full_path(folder, name) for folder in FOLDERS)
    path = next((p for p in paths if p is not None and p.endswith((".safetensors", ".sft"))), None)
    return path and described(path)


def named_steps(recipe: Recipe, base: str, hidden) -> int:
    """Of a chosen recipe: the steps that a file's name tells, where the name tells that recipe, too."""
    found = find(files(hidden), base)
    return found[2] if found and found[0] == recipe else recipe.steps


def check_base(recipe: Recipe, base: str) -> None:
    """Raise ValueError where ComfyUI found the MODEL to be of another architecture."""
    others = {kind: r.base.title for r in recipes().values() for kind in r.base.comfyui}
    if base in others and base not in recipe.base.comfyui:
        raise ValueError(
            f"family {recipe.name}: made of {recipe.base.title}, and this MODEL is {others[base]}. Choose another."
        )


def describe(recipe: Recipe, steps: int, why: str) -> str:
    times = ", ".join(f"{t:.4g}" for t in recipe.timesteps(steps))
    size = f" Made for {recipe.pixels} x {recipe.pixels} pixels." if recipe.pixels else ""
    lines = [f"{recipe.title} ({why}): {steps} step{'s' * (steps > 1)} at {times}; CFG {recipe.guidance:g}.{size}"]
    instead = " OneStep Negative subtracts one." if recipe.base.unet and recipe.guidance == 1 else ""
    lines += [f"Negative prompt: {recipe.negative}{instead}"] if recipe.negative else []
    return "\n".join([*lines, recipe.note] if recipe.note else lines)


def say(text: str, hidden) -> None:
    """Show a text on a node (ComfyUI shows what nodes return as text only on those that end a graph)."""
    if hidden is not None and hidden.unique_id is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, hidden.unique_id, PromptServer.instance.client_id)


# ------------------------------------------------------------------------------------------------------ the graph


def files(hidden) -> list[str]:
    """Names of the model and LoRA files that a node's MODEL comes through, nearest first."""
    if hidden is None or hidden.dynprompt is None:
        return []
    graph, found, seen, ahead = hidden.dynprompt, [], set(), [hidden.unique_id]
    while ahead:
        node = ahead.pop(0)
        if node in seen or not graph.has_node(node):
            continue
        seen.add(node)
        inputs = graph.get_node(node)["inputs"]
        if inputs.get("strength_model", 1) != 0:
            found += [name for value in inputs.values() for name in names(value)]
        links = {key: value[0] for key, value in inputs.items() if is_link(value)}
        models = [source for key, source in links.items() if "model" in key.lower() or "lora" in key.lower()]
        ahead += models or links.values()
    return list(dict.fromkeys(found))


def is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def names(value) -> list[str]:
    """File names in a widget's value, which may be a table with a switch, as LoRA stacks have."""
    if isinstance(value, str):
        return [value] if value.lower().endswith(ENDINGS) else []
    if isinstance(value, dict) and value.get("on", True):
        return [name for inner in value.values() for name in names(inner)]
    return []
