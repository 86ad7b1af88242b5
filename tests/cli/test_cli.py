"""The command line as a person meets it: subprocesses, files, and what is printed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from distill.backbones import load
from distill.backbones.base import weaker
from distill.file import checkpoint
from distill.file.metadata import read_metadata
from distill.header import CheckpointError
from distill.tutorial import metrics, shapes
from distill.tutorial.bundled import bundled


def distill(*args, cwd=None, **how):
    command = [sys.executable, "-m", "distill", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200, **how)


def test_help_names_every_command():
    out = distill("--help").stdout
    assert all(name in out for name in ("demo", "train", "sample", "eval", "info"))


def test_info_of_the_bundled_student():
    out = distill("info", "student").stdout
    assert "prediction  x0" in out and "t_in  999" in out and '"baked": true' in out


def test_sample_draws_what_is_asked(tmp_path):
    ring, star = "a large red ring on a white background, in the center", "a small blue star, top left"
    prompts = [ring, star]
    done = distill("sample", *prompts, "--out", tmp_path / "a.png", "--scale", 1, "--seed", 3)
    assert done.returncode == 0, done.stderr
    image = Image.open(tmp_path / "a.png")
    assert image.size == (128, 64)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 2, 64, 3).permute(1, 3, 0, 2)
    read = metrics.Judge.load().read(pixels / 127.5 - 1).attributes
    asked = torch.tensor([[4, 0, 0, 1, 0], [3, 4, int(read[1, 2]), 0, 1]])  # the second background is left open
    assert torch.equal(read, asked)
    again = distill("sample", *prompts, "--out", tmp_path / "b.png", "--scale", 1, "--seed", 3)
    assert again.returncode == 0 and (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("sample", "a ring", "--model", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("info", "README.md"), "README.md: not a safetensors file"),
        (("train", "vsd", "--out", "x", "--prompts", "empty.txt"), "empty.txt: no prompts in it"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, args, says):
    (tmp_path / "README.md").write_text("hello, I am no model at all")
    (tmp_path / "empty.txt").write_text("\n")
    done = distill(*args, cwd=tmp_path)
    assert done.returncode == 1
    assert says in done.stderr and "Traceback" not in done.stderr


def test_bundled_models_are_small_and_carry_their_figures():
    total = sum(bundled(name).stat().st_size for name in ("teacher", "student", "weak", "judge"))
    assert total < 30e6
    for name, steps in (("teacher", "50 steps"), ("student", "1 step")):
        report = read_metadata(bundled(name)).metrics[steps]
        assert report["n"] == 1024 and report["accuracy"] > 0.95 and report["held_out_accuracy"] > 0.85


def test_bundled_student_is_as_good_as_its_card():
    student = load(bundled("student"))
    report = metrics.evaluate(student.sample, metrics.Judge.load(), n=256)
    card = student.meta.metrics["1 step"]
    assert report.accuracy > card["accuracy"] - 0.04
    assert abs(report.clean - card["clean"]) < 0.1


def test_train_from_a_prompts_file(tmp_path):
    prompts = shapes.sample_prompts(16, torch.Generator().manual_seed(0))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    how = ["--steps", 3, "--batch-size", 4, "--rank", 4, "--device", "cpu", "--save-every", 2, "--autoguidance", 2]
    done = distill(
        "train", "vsd", "--guidance", 4.5, "--out", tmp_path / "run", "--prompts", tmp_path / "prompts.txt", *how
    )
    assert done.returncode == 0, done.stderr
    meta = read_metadata(tmp_path / "run" / "student.safetensors")
    assert meta.method == "vsd" and meta.guidance["baked"] and meta.teacher == "teacher.safetensors"
    assert meta.config["steps"] == 3 and meta.guidance["scale"] == 4.5
    assert str(tmp_path) not in json.dumps(meta.config)
    assert "rel_gap" in (tmp_path / "run" / "log.csv").read_text().splitlines()[0]
    refused = distill("train", "vsd", "--out", tmp_path / "run", "--prompts", tmp_path / "prompts.txt", *how)
    assert refused.returncode == 1 and "resume" in refused.stderr


def test_a_weak_teacher_called_otherwise_is_refused(tmp_path):
    weak = checkpoint.read(bundled("weak"))
    other = replace(weak.meta, schedule={**weak.meta.schedule, "shift": 1.0})
    path = checkpoint.write(tmp_path / "other.safetensors", checkpoint.Checkpoint(weak.weights, other))
    with pytest.raises(CheckpointError, match="other.safetensors: schedule"):
        weaker(load(bundled("teacher")), load(path))


def test_demo_survives_ctrl_c_and_goes_on(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "distill", "demo", "--minutes", "0.5", "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (out / "vsd" / "log.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said, said
    load(out / "student.safetensors")
    assert "resume" in distill("demo", "--minutes", 0.5, "--out", out).stderr  # refuses to overwrite it
    done = distill("demo", "--minutes", 0.5, "--out", out, "--device", "cpu", "--resume")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    rows = report["rows"]
    assert rows["student, 1 step"]["n"] == 1024
    assert rows["student, 1 step"]["frechet"] < rows["teacher, 1 step"]["frechet"]
    assert re.search(r"teacher, 50 steps \| \d", done.stdout)
    assert Image.open(out / "comparison.png").size[0] > 500
    graph = json.loads((out / "workflow.json").read_text())
    loader = next(node for node in graph["nodes"] if node["type"] == "OneStepLoadStudent")
    assert loader["widgets_values"][0] == "student.safetensors"


@pytest.mark.slow
def test_demo_meets_its_bars(tmp_path):
    """The whole demo in its default time on two cores."""
    out = tmp_path / "demo"
    start = time.monotonic()
    done = distill("demo", "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert time.monotonic() - start < 7 * 60  # five minutes, imports, and a busy machine
    rows = json.loads((out / "report.json").read_text())["rows"]
    teacher, student = rows["teacher, 50 steps"], rows["student, 1 step"]
    assert student["accuracy"] >= 0.97 * teacher["accuracy"]
    assert student["frechet"] <= 1.1 * teacher["frechet"]
    assert student["clean"] >= 0.7 * teacher["clean"]
    assert student["entropy_ratio"] >= 0.9 * teacher["entropy_ratio"]
    assert student["clean"] >= 0.75 * teacher["clean"]
