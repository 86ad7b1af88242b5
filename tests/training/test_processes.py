"""Two processes on a CPU (gloo) do what one does with twice the batches, and what they leave, either goes on with: with
whole nets, and with nets sharded as `accelerate launch --use_fsdp --fsdp_version 2` asks for."""

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

from distill.backbones import load

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).with_name("two_processes.py"))
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what accelerate's launcher sets


def started(count, words, cwd=None, **env):
    if count > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], **pipes, cwd=cwd, env=env)


def go(count, out, case="whole", kind="copy", code=0, **env):
    """(pieces of sharded tensors, weights, readouts) of each process; where it has to fail, what it says."""
    process = started(count, [SCRIPT, out, case, kind], **env)
    told, errors = process.communicate(timeout=600)
    assert (process.returncode == 0) == (code == 0), errors
    assert code or env or {line for line in told.splitlines() if line.startswith("gloo")} <= {"gloo 0"}, told
    return errors if code else [line.split(maxsplit=3)[1:] for line in told.splitlines() if line.startswith("weights")]


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


@pytest.mark.parametrize("env, pieces", [({}, 0), (SHARDED, 12)], ids=["whole", "sharded"])
def test_two_processes_are_one_with_the_same_batches(tmp_path, one, env, pieces):
    a, b = go(2, tmp_path, **env)
    assert a == b and int(a[0]) == pieces, "one net and the means over all, in both"
    near(tmp_path, one)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 5, "one set of files"


@pytest.mark.parametrize("env", [{}, SHARDED], ids=["whole", "sharded"])
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, one, env, first, then):
    go(first, tmp_path, "stop", **env)
    assert contents(tmp_path)[2] == "step-00000006.safetensors"
    go(then, tmp_path, **env)
    near(tmp_path, one)


@pytest.mark.parametrize("env", [{}, SHARDED], ids=["whole", "sharded"])
def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(tmp_path, one, env):
    go(2, tmp_path, "killed", code=1, **env)
    assert contents(tmp_path)[2] == "step-00000004.safetensors"
    go(1, tmp_path)
    near(tmp_path, one)


@pytest.mark.parametrize("env", [{}, SHARDED], ids=["whole", "sharded"])
def test_sigterm_ends_all_processes_after_the_same_step_and_saves(tmp_path, env):
    process = started(2, [SCRIPT, tmp_path, "endless"], **env)
    while not (tmp_path / "steps").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    told = int((tmp_path / "steps").read_text())
    assert told <= contents(tmp_path)[1]["step"] <= told + 1


@pytest.mark.parametrize("kind, pieces", [("lora", 6), ("two steps", 12)])
def test_a_lora_coach_stays_whole_and_a_student_may_have_more_calls(tmp_path, kind, pieces):
    go(1, tmp_path / "one", kind=kind)
    a, b = go(2, tmp_path / "two", kind=kind, **SHARDED)
    assert a == b and int(a[0]) == pieces
    near(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("env", [{}, SHARDED], ids=["whole", "sharded"])
def test_the_command_line_in_two_processes_is_one_run(tmp_path, env):
    """Prompts are encoded by both, each its shards; one prints and saves, the student that one process makes."""
    tiny.write(tmp_path / "t.safetensors", method="teacher", steps=2, guidance={"scale": 2.0, "baked": False})
    (tmp_path / "prompts.txt").write_text("a red ring\na small blue square\n" * 150)
    words = ["-m", "distill", "train", "vsd", "--coach", "copy", "--teacher", "t.safetensors", "--device", "cpu"]
    words += ["--prompts", "prompts.txt", "--steps", 2, "--batch-size", 2, "--max-spread", "1e3", "--sheet-every", 1]
    words += ["--gradient-checkpointing"]
    for count, accumulate, more in ((1, 2, {}), (2, 1, env)):
        process = started(count, [*words, "--accumulate", accumulate, "--out", f"run{count}"], tmp_path, **more)
        told, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert told.count(f"run{count}/student.safetensors") == 1
    a, b = (load(tmp_path / f"run{count}" / "student.safetensors").net.state_dict() for count in (1, 2))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)
    shards = [p.name for p in (tmp_path / "run2" / "cache").rglob("*.safetensors")]
    assert sorted(shards) == ["000000.safetensors", "000001.safetensors"]
    assert len(list((tmp_path / "run2" / "sheets").iterdir())) == 2
