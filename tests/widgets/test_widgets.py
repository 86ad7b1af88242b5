"""Widgets as a notebook uses them: still without a front end, live in a thread with one."""

from __future__ import annotations

import asyncio
import io
import threading
import time

import pytest
import torch
from PIL import Image

from distill import TrainOptions, train, widgets
from distill.methods.base import Method, Net, Phase
from distill.training.loop import Diverged


class Slope(Method):
    """The smallest method: a weight that goes to 3."""

    def __init__(self, lr=0.1, nan_at=None):
        self.net, self.lr, self.nan_at = torch.nn.Linear(1, 1, bias=False), lr, nan_at
        torch.nn.init.zeros_(self.net.weight)

    @property
    def nets(self):
        return {"student": Net(self.net, self.lr, average=True)}

    def phases(self, step):
        yield Phase("student", lambda batch, generator: self.loss(step))

    def loss(self, step):
        loss = (self.net.weight - 3).square().sum() * (float("nan") if step == self.nan_at else 1)
        return loss, {"student_loss": loss.detach()}


def start(lr=0.1, steps=40, pause=0.0, nan_at=None):
    for step in train(Slope(lr, nan_at), lambda step, g: {}, TrainOptions(steps=steps, ema=None), device="cpu"):
        time.sleep(pause)
        yield step


def draw(ax, step):
    ax.plot([0, 1], [0, step.student.weight.item()])


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, in order."""
    found = []
    monkeypatch.setattr("IPython.display.display", found.append)
    return found


@pytest.fixture
def page(monkeypatch, shown):
    """A front end."""
    for module in ("runs", "sliders", "quiz"):
        monkeypatch.setattr(f"distill.widgets.{module}.live", lambda: True)
    return shown


def pixels(png: bytes):
    return Image.open(io.BytesIO(png))


def wait(until, seconds=20):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------- without a page


def test_there_is_no_front_end_in_a_test():
    assert not widgets.live()


def test_size_is_small_when_asked(monkeypatch):
    monkeypatch.delenv("ONESTEP_FAST", raising=False)
    assert widgets.size(800, 200) == 800
    monkeypatch.setenv("ONESTEP_FAST", "1")
    assert widgets.size(800, 200) == 200


def test_a_still_dashboard_runs_to_the_end_and_shows_one_picture(shown, capsys):
    run = widgets.dashboard(start, draw, ["student_loss"], "a title", lr=[0.2, 0.1])
    assert run.result().step == 40 and run.values == {"lr": 0.2}
    assert len(run.history["student_loss"]) == 40 and run.history["student_loss"][0] == pytest.approx(9)
    assert "step 40: student_loss" in capsys.readouterr().out
    assert len(shown) == 1 and pixels(shown[0].data).width > 500


def test_a_failing_run_is_raised_where_its_result_is_asked_for(shown):
    run = widgets.dashboard(lambda: start(nan_at=3), None, ["student_loss"])
    assert run.last.step == 3
    with pytest.raises(Diverged, match="step 4: student_loss is nan"):
        run.result()


def test_a_still_explorer_shows_every_value_of_its_first_control(shown, capsys):
    colours = {2: -1.0, 4: 0.0, 8: 1.0}
    widgets.explore(lambda steps, seed: torch.full((3, 16, 16), colours[steps]), steps=[2, 4, 8], seed=[0, 1])
    assert "steps, from left to right: 2, 4, 8" in capsys.readouterr().out
    page = pixels(shown[0].data)
    assert [page.getpixel((64 * i + 32, 32))[0] for i in range(3)] == [0, 128, 255]


def test_explore_without_controls_is_refused():
    with pytest.raises(ValueError, match="at least one control"):
        widgets.explore(lambda: None)


def test_what_is_no_picture_is_named():
    with pytest.raises(TypeError, match="int is no picture"):
        widgets.show(3)


def test_compare_shows_both_sides_and_the_seam(shown):
    widgets.compare(torch.ones(3, 8, 8), -torch.ones(3, 8, 8), ("white", "black"), zoom=4)
    page = pixels(shown[0].data)  # all of the left one, half and half, all of the right one
    seen = [page.getpixel((x, 16))[0] for x in (4, 28, 36, 60, 68, 92)]
    assert seen == [255, 255, 255, 0, 0, 0]


def test_pictures_of_two_sizes_are_not_compared():
    with pytest.raises(ValueError, match="two sizes"):
        widgets.compare(torch.ones(3, 8, 8), torch.ones(3, 8, 9))


def test_a_field_is_the_function_on_a_grid():
    figure, ax = widgets.axes()
    arrows = widgets.field(widgets.plane(ax, limit=2.0), lambda p: 2 * p, n=5, limit=2.0)
    assert arrows.shape == (25, 2) and arrows.abs().max() == 4
    (quiver,) = ax.collections
    assert abs(quiver.U).max() == pytest.approx(1 / 2**0.5)  # the longest arrow is one cell long
    assert ax.get_xlabel() and ax.get_ylabel()


def test_a_sheet_has_a_labelled_row_for_each_entry():
    figure = widgets.sheet({"teacher": torch.zeros(4, 3, 8, 8), "student": torch.zeros(4, 3, 8, 8)}, titles="abcd")
    labels = [ax.get_yticklabels()[0].get_text() for ax in figure.axes]
    assert labels == ["teacher", "student"] and len(figure.axes[0].get_xticks()) == 4


def test_a_question_is_checked_against_what_was_measured(capsys):
    question = widgets.predict("What does it do?", ["rise", "fall"])
    assert "What does it do?  [rise | fall]" in capsys.readouterr().out
    assert question.check("fall") is None
    question.choose("rise")
    assert question.check("fall") is False and question.check("rise") is True
    with pytest.raises(ValueError, match="not one of rise, fall"):
        question.check("stay")
    with pytest.raises(ValueError, match="not one of rise, fall"):
        question.choose("stay")


# --------------------------------------------------------------------------------------------------- with a page


def test_a_slider_changes_the_picture_and_pictures_are_kept(page):
    calls = []

    def picture(steps):
        calls.append(steps)
        return torch.full((3, 8, 8), steps / 4)

    explorer = widgets.explore(picture, steps=[1, 2, 4])
    image = page[0].children[-1]
    before = image.value
    explorer.sliders["steps"].value = 4
    assert image.value != before and pixels(image.value).getpixel((0, 0)) == (255, 255, 255)
    explorer.sliders["steps"].value = 1
    assert image.value == before and calls == [1, 4]


def test_an_error_behind_a_slider_is_told(page):
    explorer = widgets.explore(lambda n: torch.zeros(3, 8, 8) if n else 1 / 0, n=[1, 0])
    explorer.sliders["n"].value = 0
    assert "ZeroDivisionError" in page[0].children[-2].value


def test_buttons_choose_among_named_values(page):
    seen = []
    explorer = widgets.explore(lambda kind: seen.append(kind) or torch.zeros(3, 8, 8), kind={"slow": 1, "quick": 5})
    explorer.sliders["kind"].index = 1
    assert seen == [1, 5]


def test_a_click_is_a_choice(page):
    question = widgets.predict("Which?", ["this", "that"])
    question.widget.children[1].value = "that"
    assert question.choice == "that"


def test_stop_start_and_reset(page):
    run = widgets.dashboard(lambda lr: start(lr, steps=400, pause=0.01), draw, ["student_loss"], lr=[0.1, 0.2])
    buttons = run._buttons
    wait(lambda: run.last is not None and run.last.step > 2)
    buttons["Stop"].click()
    stopped = run.last.step
    assert not run.running and len(run.history["student_loss"]) == stopped < 400
    assert buttons["Stop"].disabled and not buttons["Start"].disabled and "stopped" in run._line.value
    with pytest.raises(RuntimeError, match=f"stopped at step {stopped}: press Start"):
        run.result()
    time.sleep(0.1)
    assert run.last.step == stopped  # nothing goes on behind the page
    buttons["Start"].click()
    wait(lambda: run.last.step > stopped)
    assert run.history["student_loss"][stopped] < run.history["student_loss"][stopped - 1]  # the same run went on
    buttons["Reset"].click()
    wait(lambda: run.last is not None)
    assert run.history["student_loss"][0] == pytest.approx(9)
    run.sliders["lr"].value = 0.2  # a control begins anew
    wait(lambda: run.last is not None and run.last.step > 1)
    assert run.last.step < 100
    run.stop()


def test_stop_takes_no_more_than_a_step(page):
    run = widgets.dashboard(lambda: start(steps=1000, pause=0.2), None, ["student_loss"])
    wait(lambda: run.last is not None)
    at = run.last.step
    run.stop()
    assert not run.running and run.last.step <= at + 1


def test_buttons_are_heard_while_a_cell_waits(page):
    run = widgets.dashboard(lambda: start(steps=400, pause=0.01), None, ["student_loss"])

    async def cell():
        asyncio.get_running_loop().call_later(0.2, run._buttons["Stop"].click)
        await run.finished()

    with pytest.raises(RuntimeError, match="press Start"):
        asyncio.run(cell())
    assert run.last.step < 400


def test_who_waits_gets_the_run_that_reset_began(page):
    begun = []

    def steps():
        begun.append(1)
        try:
            yield from start(steps=60, pause=0.01)
        finally:
            time.sleep(0.2)  # closing a run takes its time

    run = widgets.dashboard(steps, None, ["student_loss"])
    wait(lambda: run.last is not None)
    threading.Thread(target=run.reset).start()
    assert run.result().step == 60 and len(begun) == 2


def test_the_page_sees_the_end(page):
    run = widgets.dashboard(start, draw, ["student_loss"])
    assert run.result().step == 40
    wait(lambda: "ended" in run._line.value)
    assert run._buttons["Start"].disabled and pixels(run._shown.value).width > 500


def test_a_picture_that_cannot_be_drawn_is_told_too(page):
    run = widgets.dashboard(start, lambda ax, step: ax.plot(step.nothing), ["student_loss"])
    with pytest.raises(AttributeError, match="nothing"):
        run.result()
    wait(lambda: "AttributeError" in run._line.value)


def test_the_page_sees_an_error(page):
    run = widgets.dashboard(lambda: start(nan_at=3), None, ["student_loss"])
    with pytest.raises(Diverged):
        run.result()
    wait(lambda: "Diverged" in run._line.value)
