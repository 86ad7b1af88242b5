"""Careless use: one line, the right exit code, nothing computed or overwritten."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from distill.backbones import load
from distill.cli import main
from distill.file.metadata import read_metadata
from distill.tutorial.bundled import bundled

TRAIN = ["--steps", "2", "--batch-size", "2", "--device", "cpu", "--save-every", "1"]
QUICK = ["train", "vsd", *TRAIN, "--rank", "2"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with things that are no models, prompts or pictures."""
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("Blåbär".encode("latin-1"))
    Path("empty.txt").write_text("\n \n")
    Path("prompts.txt").write_text("a red ring\na blue square\n")
    Path("folder").mkdir()
    Path("zero.safetensors").write_bytes(b"")
    save_file({"a.weight": torch.ones(4, 4)}, "plain.safetensors", {"made_by": "somebody"})
    tiny.write("foreign.safetensors", method="teacher", steps=2, guidance={"scale": 2.0, "baked": False})
    return tmp_path


def door(capsys, *words):
    """(exit code, stdout, stderr) of the command line."""
    capsys.readouterr()
    try:
        code = main([str(w) for w in words])
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "words, says",
    [
        (["bogus"], "'bogus' is no command; there are demo, train"),
        (["sample"], "prompts"),
        (["sample", "a ring", "--steps", "-1"], "steps is -1: 1 or more"),
        (["sample", "a ring", "--steps", "0"], "steps is 0: 1 or more"),
        (["sample", "a ring", "--guidance", "nan"], "guidance is nan: a number"),
        (["sample", "a ring", "--guidance", "5"], "guidance is 5.0: student.safetensors is a student"),
        (["sample", "a ring", "--scale", "0"], "scale is 0: 1 or more"),
        (["sample", "a ring", "--device", "foo"], "device 'foo' is not there; this machine has"),
        (
            ["sample", "a ring", "--model", "nowhere"],
            "nowhere: no such file. Give a file or folder, or a bundled",
        ),
        (["sample", "a ring", "--model", "folder"], "no model_index.json"),
        (["sample", "a ring", "--model", "plain.safetensors"], "plain.safetensors: not a OneStep file"),
        (["sample", "\udce5 ring"], "not UTF-8"),
        (["eval", "--n", "0"], "n is 0: 16 or more"),
        (["eval", "--model", "foreign.safetensors"], "foreign.safetensors': not of the tutorial world"),
        (["info", "zero.safetensors"], "zero.safetensors: "),
        (["demo", "--minutes", "0"], "minutes is 0.0: above 0"),
        (["demo", "--teacher", "foreign.safetensors"], "not of the tutorial world"),
        ([*QUICK, "--out", "x", "--prompts", "latin.txt"], "latin.txt: not UTF-8"),
        ([*QUICK, "--out", "x", "--prompts", "folder"], "folder: a folder, not a file of prompts"),
        ([*QUICK, "--out", "x", "--prompts", "empty.txt"], "empty.txt: no prompts in it"),
        ([*QUICK, "--out", "x", "--prompts", "none.txt"], "none.txt: no such file"),
        ([*QUICK, "--out", "x", "--batch-size", "0"], "batch-size is 0: 1 or more"),
        ([*QUICK, "--out", "x", "--t-in", "5000"], "t_in is 5000.0: above 0 and at most 999"),
        ([*QUICK, "--out", "x", "--t-in", "-1"], "t_in is -1.0: above 0 and at most 999"),
        ([*QUICK, "--out", "x", "--steps", "0"], "steps is 0: 1 or more"),
        ([*QUICK, "--out", "x", "--steps", "-5"], "steps is -5: 1 or more"),
        ([*QUICK, "--out", "x", "--t-min", "2"], "t_min, t_max is (2.0, 0.98)"),
        ([*QUICK, "--out", "x", "--teacher", "foreign.safetensors"], "not of the tutorial world: give --prompts"),
        ([*QUICK, "--out", "x", "--init", "foreign.safetensors"], "foreign.safetensors: another architecture"),
        (["quantize", "plain.safetensors", "plain.safetensors"], "plain.safetensors is the source itself"),
        (["quantize", "plain.safetensors", "foreign.safetensors"], "foreign.safetensors exists: add --force"),
    ],
    ids=lambda v: " ".join(v)[:60].encode("ascii", "replace").decode() if isinstance(v, list) else "",
)
def test_mistakes_are_one_line_and_exit_2(place, capsys, words, says):
    before = {p: p.read_bytes() for p in place.iterdir() if p.is_file()}
    code, out, err = door(capsys, *words)
    assert code == 2, err
    told = " ".join(err.replace("│", " ").split())
    assert says in told and "Traceback" not in err
    assert not out.strip() and not Path("x").exists()
    assert before == {p: p.read_bytes() for p in place.iterdir() if p.is_file()}


def test_a_plain_file_is_shown_by_its_header(place, capsys):
    code, out, _ = door(capsys, "info", "plain.safetensors")
    assert code == 0 and "not a OneStep file" in out and "somebody" in out


HELP = """
import sys
from distill.cli import main
for words in (["--version"], ["--help"], []):
    try:
        main(words)
    except SystemExit:
        pass
print("torch" in sys.modules)
"""


def test_version_and_help_need_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.stdout.startswith("distill 0.1.0\nusage: distill COMMAND") and done.stdout.endswith("False\n")


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m distill info student | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "MiB" in done.stdout and not done.stderr


def test_no_color_is_honoured(monkeypatch):
    from tyro import _fmtlib, _settings

    monkeypatch.setattr(_fmtlib, "_FORCE_ANSI", True)
    monkeypatch.setitem(_settings._experimental_options, "ansi_codes", True)
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    assert not _settings._experimental_options["ansi_codes"]


def test_without_its_packages_the_command_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    code, _, err = door(capsys, "info")
    assert code == 2 and err == "distill: the command line needs more packages: pip install 'onestep[distill]'\n"


def test_a_full_disk_is_told(place, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "samples.png")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    code, _, err = door(capsys, "sample", "a ring")
    assert code == 2 and err == "distill: samples.png: no space left on device\n"


# --------------------------------------------------------------------------------------------------------- training


def student(out):
    return load(Path(out) / "student.safetensors")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def test_every_method_trains_and_two_runs_of_one_seed_are_equal(place, capsys):
    for method in ("vsd", "sds", "regression"):
        few = ["--pairs", 4, "--solver-steps", 2] if method == "regression" else []
        for out in ("a", "b"):
            code, _, err = door(capsys, "train", method, *TRAIN, *few, "--out", Path(method, out), "--ema", "0.1")
            assert code == 0, err
        a, b = student(Path(method, "a")), student(Path(method, "b"))
        assert torch.equal(weights(a), weights(b)) and a.meta.method == method
    started = weights(load(bundled("teacher")))
    assert not torch.equal(weights(a), started)


def test_where_the_student_starts_and_is_called(place, capsys):
    """--init and --t-in reach the training and the file."""
    assert door(capsys, *QUICK, "--out", "first", "--t-in", 399, "--lr", "1e-2", "--ema", "0.1")[0] == 0
    meta = read_metadata("first/student.safetensors")
    assert meta.t_in == 399 and meta.config["t_in"] == 399
    frozen = ["--lr", "1e-12", "--weight-decay", "0"]
    assert door(capsys, *QUICK, "--out", "second", "--init", "first/student.safetensors", *frozen)[0] == 0
    torch.testing.assert_close(weights(student("second")), weights(student("first")), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(weights(student("second")), weights(load(bundled("teacher"))), atol=1e-3)
    logs = [next(csv.DictReader(Path(f"at{t}/log.csv").open())) for t in (999, 399) if not door(
        capsys, "train", "sds", *TRAIN, "--out", f"at{t}", "--t-in", t)[0]]  # fmt: skip
    assert logs[0]["x_std"] != logs[1]["x_std"]


def test_every_line_of_a_prompts_file_is_used(place, capsys, monkeypatch):
    seen = []

    import distill.training.prompts as prompts

    real = prompts.prompt_batches
    monkeypatch.setattr(prompts, "prompt_batches", lambda *a: recorder(real(*a), seen))
    code = door(capsys, *QUICK, "--out", "x", "--prompts", "prompts.txt", "--batch-size", 8)[0]
    assert code == 0
    rows = torch.cat([b["cond"]["class_labels"] for b in seen])
    assert len({tuple(r) for r in rows.tolist()}) == 2


def recorder(batches, seen):
    def draw(step, generator):
        seen.append(batches(step, generator))
        return seen[-1]

    return draw


def test_a_run_is_gone_on_with_only_by_its_own_kind(place, capsys):
    assert door(capsys, *QUICK, "--out", "run")[0] == 0
    good = Path("run/student.safetensors").read_bytes()
    code, _, err = door(capsys, *QUICK, "--out", "run")
    assert code == 2 and "add --resume to go on" in err
    for other, says in (
        (["train", "sds", *TRAIN], "method 'VSD', not 'SDS'"),
        ([*QUICK, "--rank", "4"], "rank 2, not 4"),
        ([*QUICK, "--coach", "copy"], "coach 'lora', not 'copy'"),
        ([*QUICK, "--t-in", "399"], "t_in 999, not 399"),
    ):
        code, _, err = door(capsys, *other, "--out", "run", "--resume")
        assert code == 2 and says in err and err.count("\n") == 1, err
        assert Path("run/student.safetensors").read_bytes() == good
    assert door(capsys, *QUICK, "--out", "run", "--resume")[0] == 0  # it had ended: the same student again
    assert torch.equal(weights(student("run")), weights(student("run")))


def test_a_run_that_diverges_keeps_its_last_good_student(place, capsys):
    assert door(capsys, *QUICK, "--out", "run")[0] == 0
    good = weights(student("run"))
    code, _, err = door(capsys, *QUICK, "--out", "run", "--resume", "--steps", 6, "--lr", "1e12")
    assert code == 1 and "Likely cure" in err and "Traceback" not in err
    assert weights(student("run")).isfinite().all()
    torch.testing.assert_close(weights(student("run")), good, rtol=0.1, atol=0.05)
    code, _, err = door(capsys, *QUICK, "--out", "new", "--lr", "1e12", "--steps", 6)
    assert code == 1 and (not Path("new/student.safetensors").exists() or weights(student("new")).isfinite().all())


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_student_and_a_run_to_go_on_with(place, sent, code):
    command = [sys.executable, "-m", "distill", *QUICK, "--out", "run", "--steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(Path("run/checkpoints").glob("step-*")) and process.poll() is None:
            pass
        os.kill(process.pid, sent)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err, err
    assert "run/student.safetensors is the student so far" in out and student("run").meta.method == "vsd"
    assert not list(Path("run/checkpoints").glob(".*"))


def test_a_stop_before_the_first_step_promises_nothing(place, capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.methods.regression.build_pairs", stopped)
    code, out, _ = door(capsys, "train", "regression", *TRAIN, "--out", "run")
    assert code == 130 and "nothing to keep yet" in out and not Path("run/student.safetensors").exists()


def test_a_diffusers_folder_is_a_teacher(place, capsys):
    tiny.stable_diffusion("sd", clip=True)
    words = ["--teacher", "sd", "--prompts", "prompts.txt", "--max-spread", "1000"]
    code, _, err = door(capsys, *QUICK, *words, "--out", "run")
    assert code == 0, err
    meta = read_metadata("run/student.safetensors")
    assert meta.teacher == "sd" and meta.prediction == "eps" and str(place) not in json.dumps(meta.config)
    code, out, err = door(capsys, "sample", "a red ring", "--model", "run/student.safetensors")
    assert code == 0 and Path("samples.png").exists(), err


def test_output_that_is_no_terminal_gets_a_line_every_tenth(place, capsys):
    _, _, err = door(capsys, *QUICK, "--out", "run", "--steps", "20")
    lines = [line for line in err.splitlines() if line.startswith("vsd: ")]
    assert [line.split(",")[0] for line in lines] == [f"vsd: {10 * i} %" for i in range(1, 11)]
    assert "coach_ratio" in lines[-1] and "\r" not in err
