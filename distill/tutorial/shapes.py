"""A procedural text-to-image world: prompts such as "a small red ring on a blue background, top left".

A picture is fixed by two tensors: `attributes` (what a prompt can say) and `style` (what it never says: jitter and
tints). Everything is drawn from a `torch.Generator`, so a seed reproduces every picture. Signed distances make the
edges anti-aliased without supersampling.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

SIZE = 64  # pixels a side

ATTRIBUTES = {
    "shape": ("circle", "square", "triangle", "star", "ring", "heart"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "background": ("white", "gray", "black", "blue", "green", "yellow", "pink", "brown"),
    "size": ("small", "large"),
    "position": ("center", "top left", "top right", "bottom left", "bottom right"),
}
NAMES = tuple(ATTRIBUTES)

_COLOUR = torch.tensor(
    [(0.86, 0.17, 0.19), (0.96, 0.52, 0.12), (0.99, 0.84, 0.16), (0.15, 0.62, 0.30),
     (0.15, 0.36, 0.86), (0.50, 0.22, 0.72), (0.95, 0.40, 0.66), (0.97, 0.97, 0.97)]
)  # fmt: skip
_BACKGROUND = torch.tensor(
    [(0.92, 0.91, 0.88), (0.55, 0.57, 0.60), (0.11, 0.11, 0.14), (0.53, 0.71, 0.90),
     (0.60, 0.80, 0.60), (0.97, 0.90, 0.60), (0.96, 0.77, 0.83), (0.44, 0.31, 0.23)]
)  # fmt: skip
_RADIUS = torch.tensor([8.5, 15.0])  # pixels
_CENTRE = torch.tensor([(0.0, 0.0), (-12.0, -12.0), (12.0, -12.0), (-12.0, 12.0), (12.0, 12.0)])  # pixels, y down

STYLE = ("dx", "dy", "scale", "rotation", "red", "green", "blue", "back red", "back green", "back blue")
STYLE_RANGE = torch.tensor([2.0, 2.0, 0.12, math.radians(14), 0.05, 0.05, 0.05, 0.05, 0.05, 0.05])


# ------------------------------------------------------------------------------------------------- attributes, prompts
def is_valid(attributes: Tensor) -> Tensor:
    """A shape must differ from its background by name. attributes (B, 5) int -> (B,) bool."""
    same = torch.tensor([[c == b for b in ATTRIBUTES["background"]] for c in ATTRIBUTES["colour"]])
    return ~same[attributes[:, 1], attributes[:, 2]]


def is_held_out(attributes: Tensor) -> Tensor:
    """About a tenth of all combinations, chosen by a fixed hash, never appear in training. (B, 5) int -> (B,) bool."""
    code = torch.zeros(len(attributes), dtype=torch.int64)
    for column, values in zip(attributes.T, ATTRIBUTES.values()):
        code = code * len(values) + column
    return (code * 2654435761 % 2**32) % 10 == 0


def sample_attributes(n: int, generator: torch.Generator, held_out: bool | None = False) -> Tensor:
    """Draw n valid combinations uniformly: (n, 5) int64. held_out: False training ones, True the others, None all."""
    found = torch.empty(0, len(NAMES), dtype=torch.int64)
    while len(found) < n:
        draw = torch.stack([torch.randint(len(v), (4 * n + 64,), generator=generator) for v in ATTRIBUTES.values()], 1)
        keep = is_valid(draw) if held_out is None else is_valid(draw) & (is_held_out(draw) == held_out)
        found = torch.cat([found, draw[keep]])
    return found[:n]


def sample_style(n: int, generator: torch.Generator) -> Tensor:
    """What prompts leave unsaid: (n, 10) in [-1, 1], columns as in STYLE."""
    return torch.rand(n, len(STYLE), generator=generator) * 2 - 1


def prompt(attributes: Tensor, stated: Tensor | None = None) -> str:
    """One row of attributes (5,) to words; `stated` (5,) bool says which of them to mention (all when None)."""
    stated = [True] * len(NAMES) if stated is None else stated.tolist()
    word = {k: ATTRIBUTES[k][i] if on else None for k, i, on in zip(NAMES, attributes.tolist(), stated)}
    noun = " ".join(w for w in (word["size"], word["colour"], word["shape"] or "shape") if w)
    text = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    if word["background"]:
        text += f" on a {word['background']} background"
    if word["position"]:
        text += ", in the center" if word["position"] == "center" else f", {word['position']}"
    return text


def sample_stated(n: int, generator: torch.Generator) -> Tensor:
    """Which attributes training prompts mention: 35 % all of them, 25 % one, the others each with probability 0.6. A
    prompt that says little leaves the most to draw, so it needs the most practice. (n, 5) bool."""
    kind = torch.rand(n, 1, generator=generator)
    some = torch.rand(n, len(NAMES), generator=generator) < 0.6
    one = torch.arange(len(NAMES)) == torch.randint(len(NAMES), (n, 1), generator=generator)
    return torch.where(kind < 0.35, True, torch.where(kind < 0.6, one, some))


def sample_prompts(n: int, generator: torch.Generator) -> list[str]:
    """n training prompts: a third state everything, a quarter one thing only; none is held out."""
    return prompts_for(sample_attributes(n, generator), generator)


def prompts_for(attributes: Tensor, generator: torch.Generator) -> list[str]:
    """A training prompt for each row of attributes (n, 5); the rare one that would state nothing is empty."""
    stated = sample_stated(len(attributes), generator)
    return [prompt(a, s) if s.any() else "" for a, s in zip(attributes, stated)]


def parse(text: str) -> dict[str, str]:
    """The attributes a prompt states, {"shape": "ring", ...}; words it does not know are ignored."""
    text = text.lower()
    found = {}
    back = re.search(r"on an? (\w+) background", text)
    if back:
        if back[1] in ATTRIBUTES["background"]:
            found["background"] = back[1]
        text = text.replace(back[0], " ")
    for name in ("shape", "colour", "size", "position"):
        words = [v for v in ATTRIBUTES[name] if re.search(rf"\b{v}\b", text)]
        if words:
            found[name] = words[0]
    return found


def vocabulary() -> list[str]:
    """Every word a prompt can contain, in a fixed order."""
    words = [w for values in ATTRIBUTES.values() for v in values for w in v.split()]
    return list(dict.fromkeys(["a", "an", "on", "in", "the", "background", "shape", ",", *words]))


# ----------------------------------------------------------------------------------------------------------- rendering
def render(attributes: Tensor, style: Tensor) -> Tensor:
    """Draw pictures. attributes (B, 5) int, style (B, 10) in [-1, 1] -> (B, 3, 64, 64) float in [-1, 1]."""
    return colour_in(*layers(attributes, style), attributes, style)


def layers(attributes: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
    """How much of its ink and of its paper each pixel shows: two of (B, 1, 64, 64). Colours play no part in it."""
    shape, _, _, size, position = attributes.T
    dx, dy, scale, rotation = (style * STYLE_RANGE)[:, :4].T
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    centre = _CENTRE[position] + torch.stack([dx, dy], 1)
    radius = _RADIUS[size] * (1 + scale)
    x = axis[None, None, :] - centre[:, 0, None, None]  # (B, 1, W)
    y = axis[None, :, None] - centre[:, 1, None, None]  # (B, H, 1)
    light = (1.02 - 0.006 * (x + y)).clamp(0.85, 1.12)  # ink is lit from the top left
    shadow = torch.sigmoid(-_distance(x - 1.8, y - 2.2, shape, radius, rotation) / 1.3) * 0.28
    cover = (0.5 - _distance(x, y, shape, radius, rotation)).clamp(0, 1)
    return (light * cover)[:, None], (_page() * (1 - shadow) * (1 - cover))[:, None]


def colour_in(ink: Tensor, paper: Tensor, attributes: Tensor, style: Tensor) -> Tensor:
    """Layers to pictures, (B, 3, 64, 64) in [-1, 1]."""
    tints = style * STYLE_RANGE
    of_ink = (_COLOUR[attributes[:, 1]] + tints[:, 4:7])[:, :, None, None]
    of_paper = (_BACKGROUND[attributes[:, 2]] + tints[:, 7:10])[:, :, None, None]
    return (of_ink * ink + of_paper * paper).clamp(0, 1) * 2 - 1


def backdrop(attributes: Tensor, style: Tensor) -> Tensor:
    """The pictures that `render` would draw of these, without their shapes. (B, 3, 64, 64) in [-1, 1]."""
    page = _page().expand(len(style), 1, SIZE, SIZE)
    return colour_in(torch.zeros(()), page, attributes, style)


def _page() -> Tensor:
    """The page is a little brighter at the top. (64, 1)."""
    return 1 - 0.0015 * (torch.arange(SIZE) - (SIZE - 1) / 2)[:, None]


def _distance(x: Tensor, y: Tensor, shape: Tensor, radius: Tensor, rotation: Tensor) -> Tensor:
    """Signed distance in pixels to each picture's own shape, negative inside. (B, H, W)."""
    cos, sin = rotation.cos()[:, None, None], rotation.sin()[:, None, None]
    x, y = x * cos + y * sin, y * cos - x * sin
    out = torch.empty_like(x)
    for i, distance in enumerate((_circle, _square, _triangle, _star, _ring, _heart)):
        chosen = shape == i
        if chosen.any():
            r = radius[chosen, None, None]
            out[chosen] = distance(x[chosen] / r, y[chosen] / r) * r
    return out


def _circle(x, y):
    return (x * x + y * y).sqrt() - 0.95


def _square(x, y):
    return torch.maximum(x.abs(), y.abs()) - 0.82


def _triangle(x, y):
    lean = math.radians(28)  # of the two upper sides from the vertical
    return torch.maximum(y - 0.68, x.abs() * math.cos(lean) - y * math.sin(lean) - 0.5)


def _star(x, y):
    points, inner = 5, 0.45
    half = math.pi / points
    angle = torch.atan2(x, -y)  # 0 at the top point
    angle = ((angle + half) % (2 * half) - half).abs()
    length = (x * x + y * y).sqrt()
    u, v = length * angle.cos(), length * angle.sin()  # folded: tip at (1.08, 0), notch at inner*(cos half, sin half)
    tip = 1.08
    nx, ny = inner * math.sin(half), tip - inner * math.cos(half)  # normal of the edge tip -> notch
    return ((u - tip) * nx + v * ny) / math.hypot(nx, ny)


def _ring(x, y):
    return ((x * x + y * y).sqrt() - 0.73).abs() - 0.25


def _heart(x, y):
    side = 0.62  # half the side of the tilted square under two discs
    u, v = (x + y - 0.02) / math.sqrt(2), (y - x - 0.02) / math.sqrt(2)
    box = torch.maximum(u.abs(), v.abs()) - side
    discs = torch.minimum(((u + 0) ** 2 + (v + side) ** 2).sqrt(), ((u + side) ** 2 + v**2).sqrt()) - side
    return torch.minimum(box, discs)
