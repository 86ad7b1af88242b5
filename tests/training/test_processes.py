"""Two processes on a CPU (gloo) do what one does with twice the batches, and what they leave, either goes on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from small_runs import contents

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).with_name("two_processes.py"))


def start(count, out, case):
    words = [SCRIPT, str(out), case]
    if count > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})


def go(count, out, case="whole", code=0):
    process = start(count, out, case)
    told, errors = process.communicate(timeout=600)
    assert (process.returncode == 0) == (code == 0), errors
    return [line.split(maxsplit=2)[1:] for line in told.splitlines() if line.startswith("weights")]


def near(a, b):
    """Two newest checkpoints are of one step, and equal but for the order in which numbers were added."""
    (tensors, state, name), (others, other_state, other_name) = contents(a), contents(b)
    assert name == other_name and tensors.keys() == others.keys()
    for key in tensors:
        torch.testing.assert_close(tensors[key], others[key], rtol=1e-4, atol=1e-5)
    for key, value in state["logs"].items():
        assert other_state["logs"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    go(1, out)
    return out


def test_two_processes_are_one_with_the_same_batches(tmp_path, one):
    (a, logs_a), (b, logs_b) = go(2, tmp_path)
    assert a == b and logs_a == logs_b, "one net and the means over all, in both"
    near(tmp_path, one)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 5, "one set of files"


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, one, first, then):
    go(first, tmp_path, "stop")
    assert contents(tmp_path)[2] == "step-00000006.safetensors"
    go(then, tmp_path)
    near(tmp_path, one)


def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(tmp_path, one):
    go(2, tmp_path, "killed", code=1)
    assert contents(tmp_path)[2] == "step-00000004.safetensors"
    go(1, tmp_path)
    near(tmp_path, one)


def test_sigterm_ends_all_processes_after_the_same_step_and_saves(tmp_path):
    process = start(2, tmp_path, "endless")
    while not (tmp_path / "steps").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    told = int((tmp_path / "steps").read_text())
    assert told <= contents(tmp_path)[1]["step"] <= told + 1


def test_the_command_line_in_two_processes_is_one_run(tmp_path):
    """Prompts are encoded by both, each its shards; one of them prints and saves."""
    tiny.write(tmp_path / "t.safetensors", method="teacher", steps=2, guidance={"scale": 2.0, "baked": False})
    (tmp_path / "prompts.txt").write_text("a red ring\na small blue square\n" * 150)
    words = ["--out", "run", "--teacher", "t.safetensors", "--prompts", "prompts.txt", "--device", "cpu"]
    words += ["--steps", "2", "--batch-size", "2", "--max-spread", "1e3"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "distill", "train", "sds"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    how = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env, "timeout": 600}
    done = subprocess.run([sys.executable, *launch, *words], **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run/student.safetensors") == 1
    shards = [p.name for p in (tmp_path / "run" / "cache").rglob("*.safetensors")]
    assert sorted(shards) == ["000000.safetensors", "000001.safetensors"]
