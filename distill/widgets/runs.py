"""A live view of a training run: readouts, samples, Start, Stop, Reset.

The steps run in a thread of their own, so the page answers while they do and Stop works within one step. Only that
thread draws, into one picture; there is no output to race for. Stopped, the generator waits where it is; Start goes on.
"""

from __future__ import annotations

import asyncio
import html
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes

from .mode import live
from .sliders import Control, canvas, controls, first
from .style import axes, curves, png

if TYPE_CHECKING:
    from ..training.state import Step

Start = Callable[..., "Iterator[Step]"]
"""(one keyword for each control) -> a fresh generator of steps, such as `train_student(...)`"""
Draw = Callable[[Axes, "Step"], Any]
"""Draws samples of the live nets of a step into axes."""
EVERY = 0.5
"""seconds between two pictures"""


class Dashboard:
    """A run that can be watched; `dashboard` makes and shows one.

    history: readouts by name, a value a step. last: the newest step. Both are whole after every step.
    """

    def __init__(
        self, start: Start, draw: Draw | None, readouts: Sequence[str], wanted: Mapping[str, Control], title: str = ""
    ):
        self.start, self.draw, self.readouts, self.wanted, self.title = start, draw, list(readouts), wanted, title
        self.sliders: dict[str, Any] = {}
        self.thread: threading.Thread | None = None
        self._shown = self._line = None  # ipywidgets, where there is a front end
        self._buttons: dict[str, Any] = {}
        self._stop, self._changing = threading.Event(), threading.RLock()
        self._clear()

    def _clear(self) -> None:
        self.history: dict[str, list[float]] = {}
        self.last: Step | None = None
        self.error: BaseException | None = None
        self.ended = False
        self._steps: Iterator[Step] | None = None

    # ------------------------------------------------------------------------------------------------ the run

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say."""
        return {n: s.value for n, s in self.sliders.items()} or first(self.wanted)

    @property
    def running(self) -> bool:
        """Whether steps are being made."""
        return self.thread is not None and self.thread.is_alive()

    def go(self) -> None:
        """Start, or go on after `stop`, in a thread."""
        if not self.running and not self.ended:
            self._stop.clear()
            self.thread = threading.Thread(target=self._work, daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """Stop after the step that is being made, and wait for that."""
        self._stop.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def reset(self) -> None:
        """Stop, forget the run, and begin a new one with what the controls say now."""
        with self._changing:  # who waits for the end does not see this one's
            self.stop()
            close = getattr(self._steps, "close", None)
            if close is not None:
                close()
            self._clear()
            self.go()

    async def finished(self) -> Step:
        """`result`, for a cell: a kernel hears buttons and sliders while a cell awaits, not while it blocks."""
        try:
            while self._going_on():
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.stop()
        return self.result()

    def _going_on(self) -> bool:
        """Whether steps are being made, or soon will be."""
        with self._changing:
            return self.running

    def result(self) -> Step:
        """Wait for the end of the run; its last step. Raises what a step raised, and RuntimeError where it was stopped
        by its button or by interrupting the cell."""
        try:
            while self._going_on():
                time.sleep(0.05)
        except KeyboardInterrupt:
            self.stop()
        if self.error is not None:
            raise self.error
        if not self.ended or self.last is None:
            at = 0 if self.last is None else self.last.step
            raise RuntimeError(f"the run stopped at step {at}: press Start, then run this cell again")
        return self.last

    def _work(self) -> None:
        self._tell()
        for part in (self._run, self._show):
            try:
                part()
            except Exception as error:  # it is raised where somebody can see it, in result()
                self.error, self.ended = self.error or error, True
        self._tell()

    def _run(self) -> None:
        """Steps until the end or until stopped."""
        drawn = time.monotonic()
        self._steps = self.start(**self.values) if self._steps is None else self._steps
        for step in self._steps:
            self.last = step
            for name, value in step.logs.items():
                self.history.setdefault(name, []).append(value)
            if time.monotonic() - drawn > EVERY and not self._stop.is_set():
                self._show()
                self._tell()
                drawn = time.monotonic()
            if self._stop.is_set():
                return
        self.ended = True

    # ----------------------------------------------------------------------------------------------- the view

    def picture(self) -> bytes:
        """The readouts so far and the samples now, as a PNG."""
        known = [r for r in self.readouts if r in self.history]
        n = len(known) + (self.draw is not None)
        figure, found = axes(max(n, 1))
        some = [found] if n <= 1 else found
        for ax, name in zip(some, known):
            values = self.history[name]
            curves(ax, range(1, len(values) + 1), {name: values}, "step", name)
        if self.draw is not None:
            self.draw(some[-1], self.last)
        return png(figure)

    def _show(self) -> None:
        if self._shown is not None and self.last is not None:
            self._shown.value = self.picture()

    def _tell(self) -> None:
        """Status line and buttons."""
        if self._line is None:
            return
        going = self.running and not self._stop.is_set()
        state = text = "ended" if self.ended else "running" if going else "stopped"
        if self.last is not None:
            logs = "   ".join(f"{r} {self.last.logs[r]:.3g}" for r in self.readouts if r in self.last.logs)
            text += f", step {self.last.step}, {self.last.progress:.0%}, {self.last.seconds:.0f} s.   {logs}"
        if self.error is not None:
            text = f"{type(self.error).__name__}: {self.error}"
        self._line.value = f"<code>{html.escape(text)}</code>"
        self._buttons["Start"].disabled = state != "stopped"
        self._buttons["Stop"].disabled = state != "running"

    def show(self) -> None:
        """Begin, and show the view; without a front end, run to the end and show a still picture of it."""
        from IPython.display import Image, display

        if not live():
            self._work()
            if self.last is not None:
                print(f"step {self.last.step}: " + ", ".join(f"{r} {self.last.logs[r]:.3g}" for r in self.readouts))
                display(Image(self.picture()))
            return
        import ipywidgets

        self.sliders = controls(self.wanted)
        self._shown, self._line = canvas(), ipywidgets.HTML()
        self._buttons = {n: ipywidgets.Button(description=n) for n in ("Start", "Stop", "Reset")}
        for name, act in {"Start": self.go, "Stop": self.stop, "Reset": self.reset}.items():
            self._buttons[name].on_click(lambda _, act=act: (act(), self._tell()))
        for slider in self.sliders.values():
            slider.observe(lambda _: self.reset(), "value")
        title = ipywidgets.HTML(f"<b>{html.escape(self.title)}</b>")
        bar = ipywidgets.HBox(list(self._buttons.values()))
        display(ipywidgets.VBox([title, *self.sliders.values(), bar, self._line, self._shown]))
        self.go()


def dashboard(
    start: Start,
    draw: Draw | None = None,
    readouts: Sequence[str] = ("student_loss",),
    title: str = "",
    **wanted: Control,
) -> Dashboard:
    """Run start(**controls) step by step and show it live.

        run = dashboard(lambda lr: train(method(lr), points, TrainOptions(steps=800)), draw, ["x_std"], lr=[1e-3, 1e-2])
        last = await run.finished()

    readouts: names in `step.logs` to plot. wanted: controls as for `explore`; moving one begins the run anew with it.
    Without a front end the call runs the first value of every control to the end and shows a still picture.
    """
    found = Dashboard(start, draw, readouts, wanted, title)
    found.show()
    return found
