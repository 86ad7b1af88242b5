"""What a run tells: sheets of pictures, TensorBoard, Weights & Biases."""

import sys
import types
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image
from small_runs import TINY, batches, build

from distill.backbones import load
from distill.training.loop import train
from distill.training.sheets import sheets


def run(out, sheet=None, resume=False, **options):
    *_, last = train(build("copy"), batches, replace(TINY, **options), out, resume, sheet=sheet)
    return last


def test_sheets_come_at_their_steps_and_show_the_average(tmp_path):
    shown = []

    def sheet(net):
        shown.append(net)
        return Image.new("RGB", (16, 8), (len(shown), 0, 0))

    last = run(tmp_path, sheet, sheet_every=5)
    assert sorted(p.name for p in (tmp_path / "sheets").iterdir()) == [f"{n:06d}.png" for n in (5, 10, 12)]
    assert Image.open(tmp_path / "sheets" / "000010.png").getpixel((3, 3)) == (2, 0, 0)
    assert all(net is last.ema for net in shown)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Images("sheet")] == [5, 10, 12]
    run(tmp_path / "none", sheet, sheet_every=None)
    assert not (tmp_path / "none" / "sheets").exists()


def test_a_sheet_is_what_sample_draws_and_the_same_again(tmp_path):
    model = load(tiny.write(tmp_path / "m.safetensors"))
    prompts = [f"a {colour} ring" for colour in ("red", "green", "blue")] * 3
    sheet = sheets(model, model.encode(prompts), seed=5)
    before = torch.random.get_rng_state()
    page = sheet(model.net)
    assert page.size == (8 * 64, 2 * 64) and torch.equal(before, torch.random.get_rng_state())
    drawn = model.sample(prompts, torch.Generator().manual_seed(5))
    ninth = ((drawn[8] + 1) * 127.5).round().byte().permute(1, 2, 0)
    shown = torch.frombuffer(bytearray(page.crop((0, 64, 64, 128)).tobytes()), dtype=torch.uint8).view(64, 64, 3)
    assert (ninth.int() - shown.int()).abs().max() <= 1
    assert sheet(model.net).tobytes() == page.tobytes()
    with torch.no_grad():
        next(model.net.parameters()).add_(0.5)
    assert sheet(model.net).tobytes() != page.tobytes()


class FakeRun:
    def __init__(self, **how):
        self.how, self.logged = how, []

    def log(self, values, step=None, **_):
        self.logged.append((step, values))


def test_weights_and_biases_hear_of_the_run_through_accelerate(tmp_path, monkeypatch):
    """The package is not needed for the tests: what accelerate's tracker calls stands in for it."""
    runs, config = [], {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **how: runs.append(FakeRun(**how)) or runs[-1]
    fake.config = types.SimpleNamespace(update=lambda values, **_: config.update(values))
    fake.Image = lambda image: image
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path, lambda net: Image.new("RGB", (4, 4)), sheet_every=6, tracker="wandb")
    run(tmp_path, steps=15, tracker="wandb", resume=True)
    assert [how["project"] for how in (r.how for r in runs)] == ["onestep"] * 2
    assert runs[0].how["id"] == runs[1].how["id"] and runs[1].how["resume"] == "allow"
    scalars = [(step, v) for step, v in runs[0].logged if "student_loss" in v]
    assert [step for step, _ in scalars] == [3, 6, 9, 12] and scalars[0][1]["coach_loss"] > 0
    assert [step for step, v in runs[0].logged if "sheet" in v] == [6, 12]
    assert config["coach_lr"] == 2e-3 and config["tracker"] == "wandb" and [s for s, _ in runs[1].logged] == [15]
    assert (tmp_path / "log.csv").exists() and (tmp_path / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="tracker wandb needs its package: pip install wandb"):
        run(tmp_path, tracker="wandb")
