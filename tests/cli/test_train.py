"""`distill train` as a person meets it: files, signals, resumed and diverged runs."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from distill.backbones import load
from distill.backbones.base import weaker
from distill.cli.console import pick_device
from distill.file import checkpoint
from distill.file.metadata import read_metadata
from distill.header import CheckpointError
from distill.sample import few_step, one_step
from distill.schedule import randn
from distill.tutorial.bundled import bundled

TRAIN = ["--steps", "2", "--batch-size", "2", "--device", "cpu", "--save-every", "1"]
QUICK = ["train", "vsd", *TRAIN, "--rank", "2"]


def student(out):
    return load(Path(out) / "student.safetensors")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def test_every_method_trains_and_two_runs_of_one_seed_are_equal(place, door):
    for method in ("vsd", "sds", "regression"):
        few = ["--pairs", 4, "--solver-steps", 2] if method == "regression" else []
        for out in ("a", "b"):
            code, _, err = door("train", method, *TRAIN, *few, "--out", Path(method, out), "--ema", "0.1")
            assert code == 0, err
        a, b = student(Path(method, "a")), student(Path(method, "b"))
        assert torch.equal(weights(a), weights(b)) and a.meta.method == method
    started = weights(load(bundled("teacher")))
    assert not torch.equal(weights(a), started)


def test_where_the_student_starts_and_is_called(place, door):
    """--init and --t-in reach the training and the file."""
    assert door(*QUICK, "--out", "first", "--t-in", 399, "--lr", "1e-2", "--ema", "0.1")[0] == 0
    meta = read_metadata("first/student.safetensors")
    assert meta.t_in == 399 and meta.config["t_in"] == 399
    frozen = ["--lr", "1e-12", "--weight-decay", "0"]
    assert door(*QUICK, "--out", "second", "--init", "first/student.safetensors", *frozen)[0] == 0
    torch.testing.assert_close(weights(student("second")), weights(student("first")), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(weights(student("second")), weights(load(bundled("teacher"))), atol=1e-3)
    logs = [next(csv.DictReader(Path(f"at{t}/log.csv").open())) for t in (999, 399) if not door(
        "train", "sds", *TRAIN, "--out", f"at{t}", "--t-in", t)[0]]  # fmt: skip
    assert logs[0]["x_std"] != logs[1]["x_std"]


def test_every_line_of_a_prompts_file_is_used(place, door, monkeypatch):
    seen = []

    import distill.training.batches as module

    real = module.prompt_batches
    monkeypatch.setattr(module, "prompt_batches", lambda *a: recorder(real(*a), seen))
    code = door(*QUICK, "--out", "x", "--prompts", "prompts.txt", "--batch-size", 8)[0]
    assert code == 0
    rows = torch.cat([b["cond"]["class_labels"] for b in seen])
    assert len({tuple(r) for r in rows.tolist()}) == 2


def recorder(batches, seen):
    def draw(step, generator):
        seen.append(batches(step, generator))
        return seen[-1]

    return draw


def test_a_run_is_gone_on_with_only_by_its_own_kind(place, door):
    assert door(*QUICK, "--out", "run")[0] == 0
    good = Path("run/student.safetensors").read_bytes()
    code, _, err = door(*QUICK, "--out", "run")
    assert code == 2 and "add --resume to go on" in err
    for other, says in (
        (["train", "sds", *TRAIN], "method 'VSD', not 'SDS'"),
        ([*QUICK, "--rank", "4"], "rank 2, not 4"),
        ([*QUICK, "--coach", "copy"], "coach 'lora', not 'copy'"),
        ([*QUICK, "--t-in", "399"], "t_in 999, not 399"),
        ([*QUICK, "--prompts", "prompts.txt"], "prompts None, not 'prompts.txt'"),
    ):
        code, _, err = door(*other, "--out", "run", "--resume")
        assert code == 2 and says in err.splitlines()[-1], err
        assert Path("run/student.safetensors").read_bytes() == good
    assert door(*QUICK, "--out", "run", "--resume")[0] == 0  # it had ended: the same student again
    assert torch.equal(weights(student("run")), weights(student("run")))


def test_a_run_that_diverges_keeps_its_last_good_student(place, door):
    assert door(*QUICK, "--out", "run")[0] == 0
    good = weights(student("run"))
    code, _, err = door(*QUICK, "--out", "run", "--resume", "--steps", 6, "--lr", "1e12")
    assert code == 1 and "Likely cure" in err and "Traceback" not in err
    assert weights(student("run")).isfinite().all()
    torch.testing.assert_close(weights(student("run")), good, rtol=0.1, atol=0.05)
    code, _, err = door(*QUICK, "--out", "new", "--lr", "1e12", "--steps", 6)
    assert code == 1 and (not Path("new/student.safetensors").exists() or weights(student("new")).isfinite().all())


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_a_student_and_a_run_to_go_on_with(place, sent, code):
    command = [sys.executable, "-m", "distill", *QUICK, "--out", "run", "--steps", "100000"]
    heard = partial(signal.signal, sent, signal.SIG_DFL)  # also where the tests run under nohup, which ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=heard) as process:
        try:
            while not list(Path("run/checkpoints").glob("step-*")) and process.poll() is None:
                pass
            os.kill(process.pid, sent)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code and "Traceback" not in err, err
    assert "run/student.safetensors is the student so far" in out and student("run").meta.method == "vsd"
    assert not list(Path("run/checkpoints").glob(".*"))


def test_a_stop_before_the_first_step_promises_nothing(place, door, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.methods.regression.build_pairs", stopped)
    code, out, _ = door("train", "regression", *TRAIN, "--out", "run")
    assert code == 130 and "nothing to keep yet" in out and not Path("run/student.safetensors").exists()


def test_a_diffusers_folder_is_a_teacher(place, door):
    tiny.stable_diffusion("sd", clip=True)
    words = ["--teacher", "sd", "--prompts", "prompts.txt", "--max-spread", "1000"]
    code, _, err = door(*QUICK, *words, "--out", "run")
    assert code == 0, err
    assert Path("run/sheets/000002.png").exists() and list(Path("run/cache").rglob("000000.safetensors"))
    meta = read_metadata("run/student.safetensors")
    assert meta.teacher == "sd" and meta.prediction == "eps" and str(place) not in json.dumps(meta.config)
    code, out, err = door("sample", "a red ring", "--model", "run/student.safetensors")
    assert code == 0 and Path("samples.png").exists(), err


def test_output_that_is_no_terminal_gets_a_line_every_tenth(place, door):
    _, _, err = door(*QUICK, "--out", "run", "--steps", "20")
    lines = [line for line in err.splitlines() if line.startswith("vsd: ")]
    assert [line.split(",")[0] for line in lines] == [f"vsd: {10 * i} %" for i in range(1, 11)]
    assert "coach_ratio" in lines[-1] and "\r" not in err


def test_what_is_recorded_is_what_was_done(place, door):
    how = ["--rank", 4, "--autoguidance", 2, "--guidance", 4.5, "--prompts", place / "prompts.txt"]
    code, _, err = door("train", "vsd", *TRAIN, *how, "--out", "run")
    assert code == 0, err
    meta = read_metadata("run/student.safetensors")
    assert meta.method == "vsd" and meta.teacher == "teacher.safetensors"
    assert meta.guidance == {"scale": 4.5, "baked": True}
    assert meta.config["steps"] == 2 and meta.config["guidance"] == 4.5 and meta.config["prompts"] == "prompts.txt"
    assert str(place) not in json.dumps(meta.config)
    assert "rel_gap" in Path("run/log.csv").read_text().splitlines()[0]


def test_a_weak_teacher_called_otherwise_is_refused(tmp_path):
    weak = checkpoint.read(bundled("weak"))
    other = replace(weak.meta, schedule={**weak.meta.schedule, "shift": 1.0})
    path = checkpoint.write(tmp_path / "other.safetensors", checkpoint.Checkpoint(weak.weights, other))
    with pytest.raises(CheckpointError, match="other.safetensors: schedule"):
        weaker(load(bundled("teacher")), load(path))


def test_nothing_begins_over_a_run_or_over_a_student_that_is_alone(place, door, monkeypatch):
    """A killed run has checkpoints and no student yet; a student may have been moved here."""
    assert door(*QUICK, "--out", "run")[0] == 0
    student = Path("run/student.safetensors")
    kept = student.read_bytes()
    student.unlink()
    for words in (["regression", *TRAIN, "--pairs", 4], ["vsd", *TRAIN, "--force"]):
        code, _, err = door("train", *words, "--out", "run")
        assert code == 2 and "run holds a run: add --resume" in err and not Path("run/pairs").exists()
    Path("alone").mkdir()
    Path("alone/student.safetensors").write_bytes(kept)
    for out, words in (("alone", QUICK), ("alone", [*QUICK, "--resume"]), ("alone", ["demo", "--resume"])):
        code, _, err = door(*words, "--out", out)
        assert code == 2 and "exists, without a run to go on with" in err
        assert Path("alone/student.safetensors").read_bytes() == kept
    assert door(*QUICK, "--out", "alone", "--force")[0] == 0
    assert Path("alone/student.safetensors").read_bytes() != kept


def test_a_stop_before_the_first_step_of_a_resumed_run_names_the_student(place, door, monkeypatch):
    assert door(*QUICK, "--out", "run")[0] == 0

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.training.students.train", stopped)
    code, out, _ = door(*QUICK, "--out", "run", "--resume")
    assert code == 130 and "run/student.safetensors is the student so far" in out


def test_every_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.zeros", lambda *a, device: torch.ones(1))
    assert str(pick_device("auto")) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:3",
        "cuda:3",
        "cuda:1",
        "cpu",
    ]


def test_a_student_of_two_steps_says_so_and_is_sampled_in_two(place, door):
    assert door(*QUICK, "--out", "two", "--student-then", 200, "--sheet-every", 2)[0] == 0
    two = student("two")
    assert (two.meta.steps, two.meta.times) == (2, [999, 200]) and list(Path("two").glob("**/*.png"))
    own, once = (two.sample(["a red ring"], torch.Generator().manual_seed(0), **how) for how in ({}, {"steps": 1}))
    g = torch.Generator().manual_seed(0)
    z, cond = randn(two.shape(1), g), two.encode(["a red ring"])
    by_hand = few_step(two.denoiser, [1.0, two.time(200)])(z, cond, g)
    torch.testing.assert_close(own, two.decode(by_hand))
    torch.testing.assert_close(once, two.decode(one_step(two.denoiser)(z, cond)))
    assert not torch.equal(own, once)
    for wrong, said in (("regression", "calls is 2"), ("vsd", "student_then")):
        then = 200 if wrong == "regression" else 999
        code, _, err = door("train", wrong, *TRAIN, "--out", wrong, "--student-then", then)
        assert code == 2 and said in err
