"""Pictures behind sliders."""

from __future__ import annotations

import html
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .mode import live
from .style import png, show, to_array

Control = Sequence[Any] | Mapping[str, Any]
"""Values for a slider, or values by name for a row of buttons."""
Draw = Callable[..., object]
"""(one keyword for each control) -> a figure, a PIL image or a picture (3, H, W) in [-1, 1]"""


def controls(wanted: Mapping[str, Control]) -> dict[str, Any]:
    """An ipywidget for each control, at its first value."""
    import ipywidgets

    found: dict[str, Any] = {}
    for name, values in wanted.items():
        title = name.replace("_", " ")
        if isinstance(values, Mapping):
            found[name] = ipywidgets.ToggleButtons(
                options=list(values.items()), description=title, style={"button_width": "auto"}
            )
        else:
            options = [(f"{v:g}" if isinstance(v, float) else str(v), v) for v in values]
            found[name] = ipywidgets.SelectionSlider(
                options=options, description=title, continuous_update=False, style={"description_width": "initial"}
            )
    return found


def canvas() -> Any:
    """An ipywidget for a PNG, as large as that is, but no wider than the page."""
    import ipywidgets

    return ipywidgets.Image(format="png", layout={"align_self": "flex-start", "max_width": "100%"})


def first(wanted: Mapping[str, Control]) -> dict[str, Any]:
    """The first value of each control."""
    return {n: next(iter(v.values() if isinstance(v, Mapping) else v)) for n, v in wanted.items()}


class Explorer:
    """draw(**values) behind a slider for each control. What was drawn once is kept."""

    def __init__(self, draw: Draw, wanted: Mapping[str, Control]):
        self.draw, self.wanted, self.kept = draw, wanted, {}
        self.lock = threading.Lock()
        self.sliders: dict[str, Any] = {}

    def picture(self, values: Mapping[str, Any]) -> bytes:
        """The PNG at some values."""
        key = tuple(repr(values[n]) for n in self.wanted)
        with self.lock:  # sliders and cells may ask from two threads
            if key not in self.kept:
                self.kept[key] = png(self.draw(**values))
            return self.kept[key]

    def show(self) -> None:
        """The sliders with their picture; without a front end, the picture at every value of the first control."""
        from IPython.display import display

        if not live():
            name, values = next(iter(self.wanted.items()))
            named = dict(values) if isinstance(values, Mapping) else {str(v): v for v in values}
            print(f"{name.replace('_', ' ')}, from left to right: {', '.join(named)}")
            show(contact([self.picture(first(self.wanted) | {name: value}) for value in named.values()]))
            return
        import ipywidgets

        self.sliders = controls(self.wanted)
        image, told = canvas(), ipywidgets.HTML()

        def update(_: object = None) -> None:
            told.value = ""
            try:
                image.value = self.picture({n: s.value for n, s in self.sliders.items()})
            except Exception as error:  # nobody sees what a callback raises
                told.value = f"<b>{type(error).__name__}</b>: {html.escape(str(error))}"

        for slider in self.sliders.values():
            slider.observe(update, "value")
        update()
        display(ipywidgets.VBox([*self.sliders.values(), told, image]))


def contact(pictures: Sequence[bytes], width: int = 1100) -> Image.Image:
    """PNGs beside each other, in as many rows as they need."""
    images = [Image.open(io.BytesIO(p)).convert("RGB") for p in pictures]
    w, h = max(i.width for i in images), max(i.height for i in images)
    columns = max(1, min(len(images), width // w))
    page = Image.new("RGB", (columns * w, -(-len(images) // columns) * h), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * w, i // columns * h))
    return page


def explore(draw: Draw, **wanted: Control) -> Explorer:
    """Show draw(**values) under a slider (for a list of values) or buttons (for a dict of them by name) each.

    explore(lambda steps, seed: picture(steps, seed), steps=[1, 2, 4, 50], seed=range(8)). Raises ValueError without any
    control.
    """
    if not wanted or not all(len(v) for v in wanted.values()):
        raise ValueError("explore needs at least one control with at least one value, such as steps=[1, 2, 4]")
    explorer = Explorer(draw, {n: v if isinstance(v, Mapping) else list(v) for n, v in wanted.items()})
    explorer.show()
    return explorer


def compare(left: Any, right: Any, names: tuple[str, str] = ("left", "right"), zoom: int = 2) -> Explorer:
    """Two pictures (3, H, W) in [-1, 1] of one size over each other, and a slider that moves the seam between them.

    Without a front end: the left one, the seam in the middle, the right one. Raises ValueError for two sizes.
    """
    if left.shape != right.shape:
        raise ValueError(f"pictures of two sizes, {tuple(left.shape)} and {tuple(right.shape)}: make them one size")
    a, b = to_array(left[None])[0], to_array(right[None])[0]

    def draw(seam: float) -> Image.Image:
        cut = round(seam * a.shape[1])
        both = np.concatenate([a[:, :cut], b[:, cut:]], axis=1).repeat(zoom, 0).repeat(zoom, 1)
        if 0 < cut < a.shape[1]:
            both[:, cut * zoom - 1 : cut * zoom + 1] = 255
        return Image.fromarray(both)

    print(f"left of the seam: {names[0]}; right of it: {names[1]}")
    return explore(draw, seam=[i / 20 for i in range(21)] if live() else [1.0, 0.5, 0.0])
