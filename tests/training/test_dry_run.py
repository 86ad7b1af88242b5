"""The dry run's estimate is what a run takes, and what it says when it does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from distill.backbones import load
from distill.cli import main
from distill.methods.vsd import VSDOptions
from distill.training import dry_run
from distill.training.batches import prompt_batches
from distill.training.dry_run import DryRun
from distill.training.meter import Meter
from distill.training.options import TrainOptions
from distill.training.students import assemble
from distill.tutorial.bundled import bundled


def test_the_meter_counts_what_is_born_and_dies_forwards_and_backwards():
    kilobyte = torch.ones(256)
    weight = torch.ones(256, requires_grad=True)
    with Meter(torch.device("cpu")) as meter:
        a = kilobyte + 1  # 1
        b = a * 2  # 2
        del a  # 1
        c = b.view(16, 16)[1:]  # a view is nothing new
        d = torch.cat([c, c])  # 2 and 7/8
        del b, c, d
    assert meter.peak == 1024 + 2 * 960
    with Meter(torch.device("cpu")) as meter:
        (weight * kilobyte).exp().sum().backward()
    assert 2 * 1024 <= meter.peak <= 3 * 1024 + 64 and weight.grad is not None
    with Meter(torch.device("cpu"), [weight.grad]) as meter:
        weight.grad = None
        kilobyte + 1
    assert meter.peak == 0, "a gradient that is freed makes room"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.stable_diffusion(tmp_path_factory.mktemp("sd")))


def dry(model, batch_size=4, training=None, **options):
    training = training or TrainOptions(max_spread=1e6)
    method = assemble(model, VSDOptions(**{"rank": 4, "guidance": 2.0} | options), training)
    return DryRun(model, method, lambda n: prompt_batches(model, ["a red ring"], n), batch_size, training)


def test_parts_are_counted_once(model):
    size = sum(p.numel() for p in model.net.parameters())
    full, lora = dry(model, coach="copy").parts, dry(model).parts
    assert full["teacher"][0] == full["student"][0] == full["coach"][0] == size
    assert full["coach: gradients"][1] == 4 * size and full["student: moments, adamw"][1] == 8 * size
    assert full["student: average"][1] == 4 * size and "coach: average" not in full
    assert 0 < lora["coach"][0] < 0.3 * size, "adapters over the teacher's own weights"
    assert "student: average" not in dry(model, training=TrainOptions(ema=None)).parts
    eight = dry(model, training=TrainOptions(optimizer="adamw8bit")).parts["student: moments, adamw8bit"][1]
    assert 2 * size <= eight < 3 * size


def test_what_does_not_fit_is_told_with_the_options_that_make_it_fit(model, monkeypatch):
    found = dry(model, batch_size=8)
    total = found.total()
    monkeypatch.setattr(dry_run, "capacity", lambda device: total)
    assert found.fits and found.lines()[-1].endswith("it fits")
    found = dry(model, batch_size=8)
    monkeypatch.setattr(dry_run, "capacity", lambda device: int(0.9 * total))
    assert not found.fits and found.cures()[0] == "--gradient-checkpointing"
    on = TrainOptions(gradient_checkpointing=True, max_spread=1e6)
    less = dry(model, batch_size=8, training=on)
    there = less.total(2)
    monkeypatch.setattr(dry_run, "capacity", lambda device: there)
    assert less.cures() == ["--batch-size 2 --accumulate 4"]
    assert "does not fit; with --batch-size 2 --accumulate 4 it does" in less.lines()[-1]
    less = dry(model, batch_size=8, training=on)
    monkeypatch.setattr(dry_run, "capacity", lambda device: less.stay // 2)
    assert less.cures() == [] and "no option makes it fit" in less.lines()[-1]


@pytest.mark.parametrize("method", ["vsd", "sds", "regression"])
def test_the_door_prints_a_table_writes_nothing_and_says_by_its_exit_code_whether_it_fits(
    tmp_path, monkeypatch, capsys, method
):
    tiny.write(tmp_path / "t.safetensors", method="teacher", steps=2, guidance={"scale": 2.0, "baked": False})
    (tmp_path / "prompts.txt").write_text("a red ring\na blue square\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = [
        "train",
        method,
        "--out",
        "x",
        "--teacher",
        "t.safetensors",
        "--prompts",
        "prompts.txt",
        "--dry-run",
    ]
    words += ["--batch-size", "2", "--device", "cpu", *(["--rank", "2"] if method == "vsd" else [])]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "student: gradients" in told and "a step of 2" in told and told.endswith("it fits\n")
    assert "(2, 32, 128)" in told and "(2, 8, 8, 8)" in told
    monkeypatch.setattr(dry_run, "capacity", lambda device: 1000)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 1 and "does not fit" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures by /proc")
def test_the_estimate_is_within_15_percent_of_what_a_run_takes(tmp_path):
    jobs = {tiny.stable_diffusion(tmp_path / "sd"): 64, bundled("teacher"): 16}  # Python's own dozen of MB is beside
    script = Path(__file__).parents[2] / "benchmarks/train_memory.py"
    words = "--student full --rank 8 --guidance 2 --no-gradient-checkpointing --warm-steps 3 --steps 3".split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for path, batch in jobs.items():
        command = [sys.executable, str(script), str(path), *words, "--batch-size", str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["estimate"] - found["teacher"] == pytest.approx(found["beyond"], rel=0.15), path
