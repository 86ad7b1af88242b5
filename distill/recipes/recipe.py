"""What a recipe says, and the table of all of them (recipes.toml)."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..file.metadata import Metadata
from ..schedule import from_spec
from .times import RULES, Rule, count

TABLE = Path(__file__).with_name("recipes.toml")


@dataclass(frozen=True)
class Base:
    """An architecture that few-step models were made of."""

    title: str
    size: int
    """pixels along a side of its usual images"""
    channels: int
    """of its latents"""
    schedule: dict[str, Any]
    """what `schedule.from_spec` takes"""
    factor: int = 8
    """image pixels a latent pixel"""
    unet: bool = False
    """whether OneStep Negative can patch it"""
    comfyui: tuple[str, ...] = ()
    """the classes of comfy.supported_models that are this architecture"""


@dataclass(frozen=True)
class Recipe:
    """How a few-step model is called. A step is: predict x0, keep the noise down to a level, add fresh noise from there
    to the next level (`steps.py`)."""

    name: str
    title: str
    base: Base
    steps: int
    """the recommended number"""
    allowed: str
    """the numbers of steps it takes: "4", "2, 4, 8" or "1-8" """
    times: str | dict[str, list[float]] | Rule
    """the timesteps: a rule, of `times.RULES` by its name, or for each number of steps a list"""
    step: str
    """where a step goes down to, a rule of `steps.DOWN`: euler, renoise, ancestral, tcd"""
    noise: str = "unit"
    """the first noise: unit is of the variance that a noised unit-variance latent has; sigma is what Euler's schedulers
    begin with, the noise of such a latent without the latent (0.998 of it at the last timestep of Stable Diffusion)"""
    prediction: str = "the base model's"
    """what the net puts out, where that is not what nets of its architecture do: x0, or the flow to the image"""
    schedule: dict[str, Any] | None = None
    """where it is not its base's"""
    eta: float = 0.0
    """for tcd: the share of the noise that is fresh (gamma in its paper); 0 adds none, 1 keeps none"""
    ends: int | None = None
    """the timestep of the last latent, where the family's sampler does not end at a clean one"""
    guidance: float = 1.0
    """ComfyUI's cfg; 1 is none"""
    weights: str = "full"
    """full, LoRA, or full or LoRA"""
    size: int = 0
    """pixels along a side of the images it was trained on; 0: its base's"""
    files: tuple[str, ...] = ()
    """regular expressions that tell it by a file's name, its other signs than letters and digits as hyphens"""
    comfyui: str = ""
    """the class of comfy.supported_models that is this model, where the architecture alone tells"""
    negative: str = ""
    """what becomes of a negative prompt"""
    note: str = ""
    licence: str = ""
    link: str = ""
    sources: tuple[str, ...] = ()

    @property
    def clock(self) -> dict[str, Any]:
        """Its schedule."""
        return self.schedule or self.base.schedule

    @property
    def pixels(self) -> int:
        """Along a side of the images it was trained on; 0: not known."""
        return self.size or self.base.size

    def takes(self, steps: int) -> bool:
        """Whether it was made for so many steps."""
        return any(low <= steps <= high for low, high in ranges(self.allowed))

    def timesteps(self, steps: int) -> list[float]:
        """The timesteps of so many steps, as the net counts them. Raises ValueError for a number it does not take."""
        if not self.takes(steps):
            raise ValueError(f"{self.title} takes {self.allowed.replace('-', ' to ')} steps, not {steps}.")
        if isinstance(self.times, dict):
            return [float(t) for t in self.times[str(steps)]]
        rule = RULES[self.times] if isinstance(self.times, str) else self.times
        return rule(steps, self.clock)

    def sigma(self, timestep: float) -> float:
        """The noise level at a timestep: sigma / alpha of a DDPM schedule, sigma of a flow."""
        schedule = from_spec(self.clock)
        if schedule.name == "flow":
            return timestep / count(self.clock)
        t = torch.as_tensor(schedule.time(timestep), dtype=torch.float64)
        return float(schedule.sigma(t) / schedule.alpha(t))


def ranges(allowed: str) -> Iterator[tuple[int, int]]:
    """ "2, 4-8" -> (2, 2), (4, 8)."""
    for part in allowed.split(","):
        low, _, high = part.partition("-")
        yield int(low), int(high or low)


@lru_cache(maxsize=1)
def recipes() -> dict[str, Recipe]:
    """Name -> recipe, in the table's order."""
    table = tomllib.loads(TABLE.read_text("utf-8"))
    bases = {name: Base(**frozen(fields)) for name, fields in table["base"].items()}
    return {
        name: Recipe(name=name, **frozen(fields) | {"base": bases[fields["base"]]})
        for name, fields in table["recipe"].items()
    }


def frozen(fields: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def of_file(meta: Metadata) -> Recipe:
    """A OneStep file's own recipe: its timesteps, with fresh noise between them for a student, none for a teacher."""
    teacher = meta.method == "teacher"
    scale = meta.guidance["scale"]
    return Recipe(
        name="onestep",
        title=f"OneStep file ({meta.method})",
        base=Base("OneStep file", 0, meta.latent["channels"], meta.schedule, meta.latent["factor"]),
        steps=meta.steps,
        allowed="1-1000",
        times=lambda steps, _: meta.timesteps(steps),
        step="euler" if teacher else "renoise",
        prediction="x0" if meta.prediction == "x0" else "the base model's",
        guidance=scale if teacher else 1.0,
        negative="Read." if teacher else "Not read: guidance is in the weights.",
        licence=meta.license,
    )


def find(names: list[str], base: str = "") -> tuple[Recipe, str, int] | None:
    """The recipe that one of the files' names tells, nearest first: (recipe, that name, steps); None where none does.

    base: the architecture's class of comfy.supported_models; recipes of others are left out, where it is known.
    steps: the number the name says, where the recipe takes it, else the recommended one.
    """
    known = {kind for r in recipes().values() for kind in r.base.comfyui}
    fitting = [r for r in recipes().values() if base not in known or base in r.base.comfyui]
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower())
        for r in fitting:
            if any(re.search(pattern, plain) for pattern in r.files):
                said = re.search(r"(\d+)-?steps?", plain)
                steps = int(said[1]) if said and r.takes(int(said[1])) else r.steps
                return r, name, steps
    return next(((r, base, r.steps) for r in fitting if base and r.comfyui == base), None)
