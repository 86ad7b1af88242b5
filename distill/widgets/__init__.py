"""What notebooks show: plots in one style, pictures, sliders, questions, and a dashboard over a training run.

    from distill import widgets

    figure, ax = widgets.axes()                      # a matplotlib figure in the course's style
    widgets.show(figure, "what it shows")
    widgets.explore(draw, steps=[1, 2, 4, 50])       # sliders; draw(steps=...) gives a figure or a picture
    run = widgets.dashboard(start, draw)             # Start, Stop and Reset over a generator of training steps
    last = await run.finished()                      # waits for it; buttons work meanwhile

Where nobody can press a button (CI, a page on the web, a script) the same calls give still pictures and dashboards run
to their end; ONESTEP_STATIC=1 asks for that in a notebook. ONESTEP_FAST=1 makes `size` choose its small numbers.
"""

from __future__ import annotations

from .mode import live, size
from .plane import field, plane, points
from .quiz import Question, predict
from .runs import Dashboard, dashboard
from .sliders import Explorer, compare, explore
from .style import COLOURS, axes, curves, sheet, show

__all__ = [
    "COLOURS", "Dashboard", "Explorer", "Question", "axes", "compare", "curves", "dashboard", "explore", "field",
    "live", "plane", "points", "predict", "sheet", "show", "size",
]  # fmt: skip
