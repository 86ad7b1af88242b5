"""Nothing is lost when the loop stops, however it stops."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_runs import TINY, assert_same, batches, build, contents, run

from distill.atomic import HERE
from distill.training import store
from distill.training.loop import train

# ------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("kind", ["lora", "two loras", "two steps", "copy", "shared", "sds", "regression"])
@pytest.mark.parametrize("stop", [1, 6])
def test_resume_is_bitwise(tmp_path, kind, stop):
    run(kind, tmp_path / "straight")
    assert run(kind, tmp_path / "halted", stop=stop).step == stop
    assert contents(tmp_path / "halted")[2] == f"step-{stop:08d}.safetensors"
    run(kind, tmp_path / "halted", resume=True)
    assert_same(tmp_path / "straight", tmp_path / "halted")


def test_everything_that_learns_is_saved(tmp_path):
    run("lora", tmp_path)
    parts = {key.split("/")[0] for key in contents(tmp_path)[0]}
    assert parts == {"student", "student_average", "coach", "student_optimizer", "coach_optimizer"}
    with safe_open(store.checkpoints(tmp_path / "checkpoints")[0], framework="pt") as f:
        state = json.loads(f.metadata()["onestep.train"])
    assert state["step"] == 12 and state["options"]["lr"] == 1e-3 and state["options"]["clip"] == 1


def test_of_two_loras_the_adapters_alone_are_saved(tmp_path):
    run("two loras", tmp_path)
    names = {key.partition("/")[2] for key in contents(tmp_path)[0] if "optimizer" not in key}
    assert names and all("lora_" in name for name in names)


def test_the_data_come_in_the_same_order_after_a_resume(tmp_path):
    def recorder(seen):
        def source(step, generator):
            batch = batches(step, generator)
            seen.append((step, batch["z"].sum().item()))
            return batch

        return source

    straight, halves = [], []
    run("copy", tmp_path / "a", source=recorder(straight))
    run("copy", tmp_path / "b", source=recorder(halves), stop=5)
    run("copy", tmp_path / "b", source=recorder(halves), resume=True)
    assert straight == halves and len({total for _, total in straight}) == len(straight)


def test_the_global_generator_is_neither_used_nor_moved():
    def logs(global_seed, options=TINY):
        method = build("lora")
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        *_, last = train(method, batches, options)
        assert torch.equal(before, torch.random.get_rng_state())
        return last.logs

    assert logs(3) == logs(4) != logs(3, replace(TINY, seed=8))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run("sds", tmp_path)
    with pytest.raises(FileExistsError, match="resume it"):
        run("sds", tmp_path)
    ended = run("sds", tmp_path, resume=True)  # nothing left to do
    assert (ended.step, ended.progress) == (12, 1) and ended.logs["student_loss"] > 0
    assert run("sds", tmp_path, replace(TINY, steps=14), resume=True).step == 14


def rows(out):
    lines = (out / "log.csv").read_text().splitlines()
    clock = lines[0].split(",").index("seconds")
    return [[v for i, v in enumerate(line.split(",")) if i != clock] for line in lines]


@pytest.mark.parametrize("stop", [4, 5, 7])
def test_the_log_of_a_resumed_run_is_that_of_the_unbroken_one(tmp_path, stop):
    run("copy", tmp_path / "straight")
    run("copy", tmp_path / "halted", stop=stop)
    run("copy", tmp_path / "halted", resume=True)
    assert rows(tmp_path / "straight") == rows(tmp_path / "halted")


def test_the_same_seed_gives_the_same_coach():
    a, b, other = (build("lora", seed=s).coach.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], other[k]) for k in a)


def test_a_run_about_something_else_is_not_gone_on_with(tmp_path, caplog):
    def go(kind, identity, resume=True, options=TINY, **changes):
        return list(train(build(kind, **changes), batches, options, tmp_path, resume, identity=identity))

    go("lora", {"teacher": "a"}, resume=False)
    with pytest.raises(ValueError, match="holds a run with method 'VSD', not 'SDS'"):
        go("sds", {"teacher": "a"})
    with pytest.raises(ValueError, match="holds a run with teacher 'a', not 'b': resume it with teacher 'a'"):
        go("lora", {"teacher": "b"})
    with pytest.raises(ValueError, match="the saved coach does not fit"):
        go("lora", {"teacher": "a"}, rank=2)
    assert not caplog.records
    longer = go("lora", {"teacher": "a"}, options=replace(TINY, steps=14), guidance=2.0)
    assert longer[-1].step == 14
    assert "resumed with steps 14; it was 12" in caplog.text and "resumed with guidance 2.0; it was 1.0" in caplog.text


# ------------------------------------------------------------------------------------------- stopping, in every way


def test_sigterm_is_ctrl_c_where_the_program_says_so(tmp_path):
    def stop(signum, frame):
        raise KeyboardInterrupt

    method, seen = build("copy"), []
    loss = method.coach_loss

    def terminated(batch, generator):
        if len(seen) == 6 and len(seen) not in pressed:
            pressed.append(len(seen))
            signal.raise_signal(signal.SIGTERM)
        return loss(batch, generator)

    method.coach_loss, pressed = terminated, []
    old = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            for step in train(method, batches, TINY, tmp_path):
                seen.append(step.step)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert contents(tmp_path)[2] == "step-00000007.safetensors"


def test_ctrl_c_waits_for_the_step_and_saves(tmp_path):
    method = build("copy")
    loss = method.coach_loss

    def interrupted(batch, generator):
        if len(seen) == 6 and not pressed:  # in the seventh step, between the student's step and the coach's
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return loss(batch, generator)

    method.coach_loss, seen, pressed = interrupted, [], []
    old = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        for step in train(method, batches, TINY, tmp_path / "halted"):
            seen.append(step.step)
    assert signal.getsignal(signal.SIGINT) is old
    assert contents(tmp_path / "halted")[2] == "step-00000007.safetensors"
    run("copy", tmp_path / "halted", resume=True)
    run("copy", tmp_path / "straight")
    assert_same(tmp_path / "straight", tmp_path / "halted")


def test_a_second_ctrl_c_stops_at_once_and_saves_no_half_step(tmp_path):
    method = build("copy")
    loss, seen = method.coach_loss, []

    def impatient(batch, generator):
        if len(seen) == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss(batch, generator)

    method.coach_loss = impatient
    with pytest.raises(KeyboardInterrupt):
        for step in train(method, batches, TINY, tmp_path):
            seen.append(step.step)
    assert contents(tmp_path)[2] == "step-00000004.safetensors"


def test_ctrl_c_in_the_callers_own_code_saves_too(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        for step in train(build("copy"), batches, TINY, tmp_path):
            if step.step == 6:
                raise KeyboardInterrupt
    assert contents(tmp_path)[2] == "step-00000006.safetensors"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_loses_at_most_n_steps_and_never_a_file(tmp_path):
    """SIGKILL at ten random moments of one run; then it is bitwise the run that was never killed."""
    dice, every, newest = random.Random(0), 5, 0
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}
    command = [sys.executable, str(Path(__file__).with_name("killed_run.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen(command, **pipes) as launcher:
        for _ in range(10):
            print(tmp_path / "killed", file=launcher.stdin, flush=True)
            pid = int(launcher.stdout.readline().split()[1])
            steps = [int(launcher.stdout.readline().split()[1]) for _ in range(dice.randint(1, 15))]
            assert steps[0] == newest + 1, "it went on where the last checkpoint was"
            time.sleep(dice.random() * 0.02)
            os.kill(pid, signal.SIGKILL)
            steps += [int(line.split()[1]) for line in iter(launcher.stdout.readline, "ended\n")]
            found = store.checkpoints(tmp_path / "killed" / "checkpoints")
            newest = contents(tmp_path / "killed")[1]["step"] if found else 0
            assert newest > steps[-1] - every
            assert len(found) <= 3 and [p for p in found if not readable(p)] == []
        launcher.stdin.close()
    endless = replace(TINY, steps=10**6, save_every=every)
    run("copy", tmp_path / "killed", endless, resume=True, stop=newest + 3)
    run("copy", tmp_path / "straight", endless, stop=newest + 3)
    assert_same(tmp_path / "straight", tmp_path / "killed")


def readable(path):
    try:
        with safe_open(path, framework="pt") as f:
            return all(f.get_tensor(k) is not None for k in f.keys())
    except Exception:
        return False


@pytest.mark.parametrize("moment", ["safetensors.torch.save_file", "distill.atomic.sync", "os.replace"])
def test_a_crash_while_saving_keeps_the_last_good_one(tmp_path, monkeypatch, moment):
    def crash(*args, **kwargs):
        for path in (a for a in args if isinstance(a, Path) and a.name == "new" and "checkpoints" in a.parts):
            path.write_bytes(path.read_bytes()[:500] if path.exists() else b"half")
            raise OSError("no space left on device")
        return real(*args, **kwargs)

    run("copy", tmp_path, stop=5)
    module, _, name = moment.rpartition(".")
    real = getattr(sys.modules[module], name)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(moment, crash)
        run("copy", tmp_path, resume=True)
    assert contents(tmp_path)[2] == "step-00000005.safetensors"
    assert all(readable(p) for p in (tmp_path / "checkpoints").iterdir())
    assert run("copy", tmp_path, resume=True).step == 12


def test_an_unreadable_checkpoint_is_passed_over(tmp_path):
    run("copy", tmp_path / "a")
    run("copy", tmp_path / "b")
    newest, older = store.checkpoints(tmp_path / "b" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:1000])
    left = newest.parent / f".onestep-4194305@{HERE}-left_"  # no system numbers its processes so high
    left.mkdir()
    (left / ".tmpXYZ").write_bytes(b"by a kill")
    with pytest.warns(UserWarning, match=newest.name):
        assert run("copy", tmp_path / "b", resume=True).step == 12
    assert_same(tmp_path / "a", tmp_path / "b")
    assert not list(newest.parent.glob(".*"))
    assert len(store.checkpoints(newest.parent)) == TINY.keep and older.exists()


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_run_whose_checkpoints_are_all_unreadable_is_not_begun_anew(tmp_path):
    run("copy", tmp_path)
    found = store.checkpoints(tmp_path / "checkpoints")
    for path in found:
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="none of its checkpoints can be read"):
        run("copy", tmp_path, resume=True)
    assert [p.read_bytes() for p in found] == [b"damaged"] * len(found)
