"""The table of all recipes as a page of the documentation, and one recipe in full."""

from __future__ import annotations

from .recipe import Recipe, recipes

TIMES = {
    "trailing": "even, from 999 (trailing)",
    "consistency": "of the 50 it was distilled at (999, 979, ..., 19), evenly",
    "flow": "even, from pure noise",
    "shifted": "even, from pure noise to the least, shifted",
    "angles": "TrigFlow's angles: 1.5708, for two steps also 1.3",
}
STEP = {
    "euler": "Euler, no fresh noise",
    "renoise": "x0, then fresh noise",
    "ancestral": "Euler ancestral",
    "tcd": "TCD",
}
HEAD = """# Recipes

How each public few-step model must be called. This page is written by `distill recipes --page`, from
[`distill/recipes/recipes.toml`](../distill/recipes/recipes.toml), which **OneStep Recipe**, **OneStep Sample** and the
command line read too; a test keeps it in step.

With all of them **CFG is 1 and the negative prompt is not read**, where the last column says nothing else; with U-Nets
**OneStep Negative** subtracts one all the same.

A step is one formula for all families: predict x0, keep the noise down to a level, add fresh noise up to the next. They
differ in that level: Euler and DDIM go down all the way and add none; LCM, DMD2 and sCM go down to the clean picture
and add it all; TCD and Euler ancestral are between.

- **x0**: the net puts out x0 itself; all others put out what nets of their base do.
- **unit** noise has the variance of a noised latent, whatever the first timestep. Stock samplers give that only when
  they begin at the last timestep: DMD2 in one step, called at 399, would get 0.758 of it. **sigma** noise is what
  Euler's schedulers in diffusers begin with, 0.998 of it.
- **ends at t = 0**: diffusers' DDIM and TCD schedulers end at the level of timestep 0, a trace of noise, and so does
  the recipe.
- **Scaling of LCM** (c_skip, c_out) is not in the table because it changes nothing: at the smallest timestep it
  was distilled at, 19, it is 1 within 7e-6, and nearer above.

| recipe | of | weights | steps | timesteps | a step | licence | more |
|---|---|---|---|---|---|---|---|
"""


def row(r: Recipe) -> str:
    """A line of the table."""
    steps = f"{r.allowed.replace('-', ' to ')}" + ("" if r.allowed == str(r.steps) else f" (usual: {r.steps})")
    size = f", {r.size} px" if r.size else ""
    more = [] if r.prediction == "the base model's" else [f"puts out {r.prediction}"]
    more += [f"CFG {r.guidance:g}"] if r.guidance != 1 else []
    more += [] if r.negative.startswith("Not read") else [f"negative prompt: {r.negative}"]
    more += [r.note] if r.note else []
    cells = [f"[{r.title}]({r.link}) `{r.name}`", f"{r.base.title}{size}", r.weights, steps, times(r), step(r)]
    return f"| {' | '.join([*cells, r.licence, '; '.join(m.rstrip('.') for m in more)])} |"


def times(r: Recipe) -> str:
    if isinstance(r.times, dict) or r.allowed == "1":
        return ", ".join(f"{t:g}" for t in r.timesteps(r.steps))
    shift = r.clock.get("shift", 1.0)
    return f"{TIMES[r.times]}{f' by {shift:g}' if shift != 1 else ''}"


def step(r: Recipe) -> str:
    parts = ["one call" if r.allowed == "1" else STEP[r.step]] + ([f"eta {r.eta:g}"] if r.step == "tcd" else [])
    parts += [f"{r.noise} noise"] + ([] if r.ends is None else [f"ends at t = {r.ends}"])
    return ", ".join(parts)


def page() -> str:
    """docs/recipes.md."""
    lines = [HEAD.rstrip("\n"), *(row(r) for r in recipes().values()), "", "## Sources", ""]
    lines += [
        "Of each number; commits and versions are those that were read, in November 2026. Some model cards were read",
        "through copies and other people's code, and licences change: see the link before you use a model.",
        "",
    ]
    lines += [f"- **{r.title}**: {'; '.join(r.sources)}" for r in recipes().values()]
    return "\n".join(lines) + "\n"


def told(r: Recipe) -> str:
    """One recipe, for a terminal."""
    facts = {
        "of": f"{r.base.title}, {r.pixels} px, {r.base.channels} latent channels, factor {r.base.factor}",
        "weights": r.weights,
        "steps": f"{r.allowed.replace('-', ' to ')}, usually {r.steps}",
        "timesteps": ", ".join(f"{t:g}" for t in r.timesteps(r.steps)),
        "puts out": r.prediction,
        "a step": step(r),
        "guidance": f"{r.guidance:g}",
        "negative": r.negative,
        "note": r.note,
        "licence": r.licence,
        "link": r.link,
    }
    lines = [r.title, *(f"{name:>10}  {fact}" for name, fact in facts.items() if fact)]
    return "\n".join([*lines, *(f"{'source':>10}  {source}" for source in r.sources)])
