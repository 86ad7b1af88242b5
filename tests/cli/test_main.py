"""`distill` itself: help, colours, pipes, disks, several processes."""

import os
import pty
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from distill import cli
from distill.header import CheckpointError

QUICK = ["train", "vsd", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--rank", "2", "--out", "run"]


def run(*words, **how):
    command = [sys.executable, "-m", "distill", *words]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300, **how)


# ------------------------------------------------------------------------------------------------- without torch

FACE = """
import sys
from distill.cli import main
for words in (["--version"], ["--help"], [], ["info", "student"], ["sample", "--help"], ["eval", "--help"]):
    try:
        main(words)
    except SystemExit as stopped:
        assert not stopped.code
print("torch" in sys.modules)
"""


def test_version_help_and_info_need_no_torch():
    done = subprocess.run([sys.executable, "-c", FACE], capture_output=True, text=True)
    assert done.stdout.startswith("distill 0.1.0\nusage: distill COMMAND") and "prediction  v" in done.stdout
    assert done.stdout.endswith("False\n"), done.stderr


def test_no_color_is_honoured():
    def shown(**environment):
        """What --help writes to a terminal."""
        ours, theirs = pty.openpty()
        run("info", "--help", stdout=theirs, env=os.environ | {"TERM": "xterm"} | environment)
        os.close(theirs)
        text = b""
        try:
            while part := os.read(ours, 1 << 16):
                text += part
        except OSError:  # Linux' end of file
            pass
        os.close(ours)
        return text

    assert b"\x1b[" in shown(NO_COLOR="") and b"\x1b[" not in shown(NO_COLOR="1")


def test_a_pipe_that_nobody_reads_is_told_to_nobody():
    ours, theirs = os.pipe()
    os.close(ours)
    done = run("info", "student", stdout=theirs)
    os.close(theirs)
    assert done.returncode == 141 and not done.stderr


# -------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("missing", ["tyro", "PIL"])
def test_without_its_packages_the_command_line_says_what_to_install(door, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = door("sample", "a ring")
    assert code == 2 and err.count("\n") == 1 and missing in err and "pip install 'onestep[distill]'" in err


@pytest.mark.parametrize("error", [ImportError("cannot import name 'x'", name="distill.schedule"), KeyError("x")])
def test_our_own_mistakes_keep_their_traceback(door, monkeypatch, error):
    def broken(*args):
        raise error

    monkeypatch.setattr("distill.cli.info.run", broken)
    with pytest.raises(type(error)):
        door("info")


class OutOfMemoryError(RuntimeError):
    """As torch's is named."""


@pytest.mark.parametrize(
    "error, code, says",
    [
        (CheckpointError("x: torn.\nGet another."), 2, "x: torn. Get another."),
        (ImportError("format gguf needs the gguf package: pip install gguf"), 2, "package: pip install gguf"),
        (PermissionError(13, "Permission denied", "x.png"), 2, "x.png: permission denied"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1, cli.MEMORY),
        (MemoryError(), 1, cli.MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 1, cli.MEMORY),
    ],
)
def test_errors_are_one_line(door, monkeypatch, error, code, says):
    def fails(*args):
        raise error

    monkeypatch.setattr("distill.cli.info.run", fails)
    got, _, err = door("info")
    assert (got, err) == (code, f"distill: {says}\n") or err.endswith(f"{says}\n") and got == code


@contextmanager
def room(size):
    """No file may grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(place, door):
    assert door("sample", "a red ring")[0] == 0
    before = Path("samples.png").read_bytes()
    with room(100):
        code, _, err = door("sample", "a blue ring")
    assert code == 1 and err.count("\n") == 1 and "file too large" in err.lower(), err
    assert Path("samples.png").read_bytes() == before and not list(place.glob(".*"))


def test_a_disk_that_fills_while_training_is_told(place, door):
    with room(1_000_000):
        code, _, err = door(*QUICK)
    assert code == 1 and "file too large" in err.lower() and "Traceback" not in err
    assert not [p for p in place.rglob("*") if p.suffix == ".safetensors" and "run" in p.parts or ".tmp" in p.name]


# ------------------------------------------------------------------------------------------------ several processes


def test_only_the_first_process_prints_and_writes(place, door, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, out, err = door(*QUICK)
    assert code == 0 and not out and not err and not Path("run/student.safetensors").exists()


@pytest.mark.slow
def test_torchrun_prints_and_writes_once(place):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "distill"]
    done = subprocess.run([*launch, *QUICK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run/student.safetensors\n" and done.stderr.count("vsd: 100 %") == 1
    refused = subprocess.run([*launch, "demo", "--out", "demo"], capture_output=True, text=True, timeout=300)
    assert refused.returncode and "the demo runs in one process" in refused.stderr and not Path("demo").exists()
