"""The loop: what it changes and when, and that nothing is lost when it stops."""

import copy
import csv
import gc
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
from torch import nn

from distill import persist
from distill import schedule as S
from distill.coach import CopyCoach, LoraCoach
from distill.denoiser import from_net, guided
from distill.methods.regression import Regression, RegressionOptions, build_pairs
from distill.methods.sds import SDS, SDSOptions
from distill.methods.vsd import VSD, VSDOptions
from distill.run import Run
from distill.sample import one_step, solve
from distill.toy import MLP, Mixture, ring
from distill.train import Diverged, TrainOptions, seeded, train

SCHEDULE = S.flow()
TINY = TrainOptions(steps=12, save_every=4, log_every=3, lr=1e-3, coach_lr=2e-3, coach_steps=2, accumulate=2, seed=7)


class Net(nn.Module):
    """An MLP with a prompt of two numbers."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP(4, 16, generator=torch.Generator().manual_seed(0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, index, cond):
        return self.mlp(torch.cat([x, cond["c"]], 1), index)[:, :2]


def make(net):
    return from_net(net, SCHEDULE, "x0")


def build(kind):
    """(method, student, coach), always the same."""
    net = Net()
    student, null = copy.deepcopy(net), {"c": torch.zeros(1, 2)}
    if kind == "lora":
        coach = LoraCoach(net, make, rank=4, generator=torch.Generator().manual_seed(1))
    else:
        coach = CopyCoach(net, make)
    if kind == "sds":
        return SDS(SDSOptions(), one_step(make(student)), coach, null), student, None
    if kind == "regression":
        return Regression(RegressionOptions(), one_step(make(student))), student, None
    options = VSDOptions(guidance=1.0, guidance_max=3.0, coach_batch="shared" if kind == "shared" else "fresh")
    return VSD(options, one_step(make(student)), coach, null), student, coach


def batches(step, generator):
    cond = {"c": torch.randn(8, 2, generator=generator)}
    z, x0 = torch.randn(2, 8, 2, generator=generator)
    return {"cond": cond, "shape": (8, 2), "z": z, "x0": x0}


def run(kind, out=None, options=TINY, resume=False, stop=None, source=batches):
    """Train to the end or to step `stop`; the last step."""
    step = None
    for step in train(*build(kind), source, options, out, resume):
        if step.step == stop:
            break
    gc.collect()
    return step


def contents(out):
    """Everything in the newest checkpoint but the clock."""
    tensors, state, path = persist.load(Path(out) / "checkpoints")
    return tensors, {k: v for k, v in state.items() if k != "seconds"}, path.name


def assert_same(a, b):
    (tensors_a, state_a, name_a), (tensors_b, state_b, name_b) = contents(a), contents(b)
    assert name_a == name_b and state_a == state_b and tensors_a.keys() == tensors_b.keys()
    for key in tensors_a:
        assert torch.equal(tensors_a[key], tensors_b[key]), key


# ------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("kind", ["lora", "copy", "shared", "sds", "regression"])
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
    assert parts == {"student", "ema", "coach", "student_optimizer", "coach_optimizer"}
    with safe_open(persist.checkpoints(tmp_path / "checkpoints")[0], framework="pt") as f:
        state = json.loads(f.metadata()["onestep.train"])
    assert state["step"] == 12 and state["options"]["lr"] == 1e-3


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
        parts = build("lora")
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        *_, last = train(*parts, batches, options)
        assert torch.equal(before, torch.random.get_rng_state())
        return last.logs

    assert logs(3) == logs(4) != logs(3, replace(TINY, seed=8))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run("sds", tmp_path)
    with pytest.raises(FileExistsError, match="resume=True"):
        run("sds", tmp_path)
    ended = run("sds", tmp_path, resume=True)  # nothing left to do
    assert (ended.step, ended.progress) == (12, 1) and ended.logs["student_loss"] > 0
    assert run("sds", tmp_path, replace(TINY, steps=14), resume=True).step == 14


# ------------------------------------------------------------------------------------------- stopping, in every way


def test_ctrl_c_waits_for_the_step_and_saves(tmp_path):
    method, student, coach = build("copy")
    loss = method.coach_loss

    def interrupted(batch, generator):
        if len(seen) == 6 and not pressed:  # in the seventh step, between the student's step and the coach's
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return loss(batch, generator)

    method.coach_loss, seen, pressed = interrupted, [], []
    old = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        for step in train(method, student, coach, batches, TINY, tmp_path / "halted"):
            seen.append(step.step)
    assert signal.getsignal(signal.SIGINT) is old
    assert contents(tmp_path / "halted")[2] == "step-00000007.safetensors"
    run("copy", tmp_path / "halted", resume=True)
    run("copy", tmp_path / "straight")
    assert_same(tmp_path / "straight", tmp_path / "halted")


def test_a_second_ctrl_c_stops_at_once_and_saves_no_half_step(tmp_path):
    method, student, coach = build("copy")
    loss, seen = method.coach_loss, []

    def impatient(batch, generator):
        if len(seen) == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss(batch, generator)

    method.coach_loss = impatient
    with pytest.raises(KeyboardInterrupt):
        for step in train(method, student, coach, batches, TINY, tmp_path):
            seen.append(step.step)
    assert contents(tmp_path)[2] == "step-00000004.safetensors"


def test_ctrl_c_in_the_callers_own_code_saves_too(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        for step in train(*build("copy"), batches, TINY, tmp_path):
            if step.step == 6:
                raise KeyboardInterrupt
    assert contents(tmp_path)[2] == "step-00000006.safetensors"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_loses_at_most_n_steps_and_never_a_file(tmp_path):
    """SIGKILL at ten random moments of one run; then it is bitwise the run that was never killed."""
    dice, every, newest = random.Random(0), 5, 0
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
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
            found = persist.checkpoints(tmp_path / "killed" / "checkpoints")
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


@pytest.mark.parametrize("moment", ["safetensors.torch.save_file", "distill.persist.sync", "os.replace"])
def test_a_crash_while_saving_keeps_the_last_good_one(tmp_path, monkeypatch, moment):
    def crash(*args, **kwargs):
        for path in (a for a in args if isinstance(a, Path) and a.suffix == ".tmp" and "step-" in a.name):
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
    newest, older = persist.checkpoints(tmp_path / "b" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:1000])
    (newest.parent / ".step-00000016.safetensors.1.tmp").write_bytes(b"left by a kill")
    with pytest.warns(UserWarning, match=newest.name):
        assert run("copy", tmp_path / "b", resume=True).step == 12
    assert_same(tmp_path / "a", tmp_path / "b")
    assert not list(newest.parent.glob(".*"))
    assert len(persist.checkpoints(newest.parent)) == TINY.keep and older.exists()


# --------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("readout, word", [("student_loss", "lower lr"), ("coach_loss", "coach_lr")])
def test_nan_stops_with_the_readout_and_a_cure(tmp_path, readout, word):
    method, student, coach = build("copy")
    name, steps = readout, []
    loss = getattr(method, name)

    def poisoned(batch, generator):
        value, logs = loss(batch, generator)
        return (value * torch.nan, logs | {name: logs[name] * torch.nan}) if len(steps) == 5 else (value, logs)

    setattr(method, name, poisoned)
    with pytest.raises(Diverged, match=f"step 6: {readout} is nan. Likely cure: .*{word}") as caught:
        for step in train(method, student, coach, batches, TINY, tmp_path):
            steps.append(step)
    assert caught.value.readout == readout and word in caught.value.cure
    assert contents(tmp_path)[2] == "step-00000004.safetensors"  # the last good one, and nothing after it
    assert all(v.isfinite().all() for v in contents(tmp_path)[0].values())


def test_samples_that_fly_apart_stop_it():
    with pytest.raises(Diverged, match="x_std is .*coach_steps"):
        run("copy", options=replace(TINY, max_spread=0.01))


# -------------------------------------------------------------------------------------------------- what a step does


def moved(before, module):
    return any(not torch.equal(a, b) for a, b in zip(before.parameters(), module.parameters()))


def test_the_coach_warms_up_alone():
    method, student, coach = build("copy")
    start = copy.deepcopy(student), copy.deepcopy(coach.module["coach"])
    for step in train(method, student, coach, batches, replace(TINY, coach_warmup=3)):
        assert moved(start[0], student) == (step.step > 3) and moved(start[1], coach.module["coach"])
        assert ("student_loss" in step.logs) == (step.step > 3)
    assert not moved(coach.module["teacher"], Net())


def test_coach_steps_and_accumulation_are_counted():
    calls = []
    method, student, coach = build("copy")
    for name in ("student_loss", "coach_loss"):
        loss = getattr(method, name)
        setattr(method, name, lambda b, g, loss=loss, name=name: (calls.append(name), loss(b, g))[1])
    next(train(method, student, coach, batches, replace(TINY, coach_steps=3, accumulate=2)))
    assert calls == ["student_loss"] * 2 + ["coach_loss"] * 6


def test_accumulation_is_a_larger_batch():
    def halves(rows):
        def source(step, generator):
            batch = batches(0, torch.Generator().manual_seed(step))
            part = next(rows) if rows else slice(None)
            return {"z": batch["z"][part], "x0": batch["x0"][part], "cond": {"c": batch["cond"]["c"][part]}}

        return source

    rows = (slice(i % 2 * 4, i % 2 * 4 + 4) for i in range(100))
    one = run("regression", options=replace(TINY, accumulate=1), source=halves(None))
    two = run("regression", options=replace(TINY, accumulate=2), source=halves(rows))
    for a, b in zip(one.student.parameters(), two.student.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert one.logs["student_grad_norm"] == pytest.approx(two.logs["student_grad_norm"], rel=1e-3)


def test_learning_rates_rise_stay_and_fall():
    _, student, coach = build("copy")
    state, rates = Run(student, coach, replace(TINY, steps=100, lr_warmup=9, lr_end=0.1)), []
    for state.step in range(101):
        state.set_lr()
        rates.append([o.param_groups[0]["lr"] for o in state.optimizers.values()])
    student_lr, coach_lr = zip(*rates)
    assert student_lr[0] == pytest.approx(1e-4) and student_lr[9:51] == (1e-3,) * 42
    assert student_lr[75] == pytest.approx(0.55e-3) and student_lr[100] == pytest.approx(1e-4)
    assert [2 * a for a in student_lr] == pytest.approx(coach_lr)


def test_ema_is_the_warmed_up_average():
    seen = 0
    method, student, coach = build("copy")
    expected = [p.detach().clone() for p in student.parameters()]
    for step in train(method, student, coach, batches, replace(TINY, ema=0.5)):
        seen += 1
        decay = min(0.5, (1 + seen) / (10 + seen))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, student.parameters())]
        for e, p in zip(expected, step.ema.parameters()):
            torch.testing.assert_close(e, p)
    assert not step.ema.training and not any(p.requires_grad for p in step.ema.parameters())


def test_a_time_budget_ends_the_run_and_drives_the_rate():
    start = time.monotonic()
    steps = list(train(*build("copy"), batches, replace(TINY, steps=None, minutes=1 / 60)))
    assert 0.9 < time.monotonic() - start < 6 and len(steps) > 20
    progress = [s.progress for s in steps]
    assert progress == sorted(progress) and progress[-1] == 1 and steps[-1].remaining == 0
    middle = steps[len(steps) // 2]
    assert middle.remaining == pytest.approx(1 - middle.seconds, abs=0.2)


def test_bf16_is_inside_the_nets_only():
    """Weights, moments and losses stay fp32; the run is near the fp32 run, and not the same."""
    dtypes, results = set(), {}
    for precision in ("no", "bf16"):
        method, student, coach = build("lora")
        student.mlp.layers[0].register_forward_hook(lambda m, i, out: dtypes.add(out.dtype))
        *_, last = train(method, student, coach, batches, replace(TINY, precision=precision, steps=3))
        results[precision] = torch.cat([p.detach().flatten() for p in student.parameters()])
        assert results[precision].dtype == torch.float32 and last.logs["x_std"] > 0
    assert dtypes == {torch.float32, torch.bfloat16}
    assert not torch.equal(*results.values())
    torch.testing.assert_close(*results.values(), rtol=0, atol=0.01)


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    """The same weights in both, from different data; one set of files."""
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_train import *
*_, last = train(*(parts := build("copy")), batches, replace(TINY, device="cpu"), {str(tmp_path / "run")!r})
print("weights", sum(p.double().sum().item() for p in parts[1].parameters()), last.logs["student_loss"], flush=True)
"""
    (tmp_path / "two.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "two.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    (a, loss_a), (b, loss_b) = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("weights"))
    assert a == b and loss_a != loss_b
    assert len(read(tmp_path / "run")) == 4


def test_a_student_with_nothing_to_train_is_refused():
    method, student, coach = build("copy")
    with pytest.raises(ValueError, match="copy it before"):
        next(train(method, student.requires_grad_(False), coach, batches, TINY))


# ------------------------------------------------------------------------------------------------------- readouts


def read(out):
    with (out / "log.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_csv_and_tensorboard_hold_the_coachs_health(tmp_path):
    steps = list(train(*build("lora"), batches, replace(TINY, coach_warmup=4), tmp_path))
    rows = read(tmp_path)
    assert [int(r["step"]) for r in rows] == [3, 6, 9, 12]
    wanted = {"coach_loss", "coach_ratio", "rel_gap", "cosine", "student_grad_norm", "coach_grad_norm", "x_drift"}
    wanted |= {"x_mean", "x_std", "x_mean_0", "x_std_1", "student_loss", "seconds"}
    assert wanted <= rows[0].keys()
    assert rows[0]["rel_gap"] == "" and float(rows[1]["rel_gap"]) > 0  # the coach was alone at first
    mean = sum(s.logs["coach_loss"] for s in steps[3:6]) / 3
    assert float(rows[1]["coach_loss"]) == pytest.approx(mean, rel=1e-4)
    assert steps[5].row["coach_loss"] == pytest.approx(mean) and steps[4].row == {}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("coach_loss")] == [3, 6, 9, 12]


def test_rows_that_a_resumed_run_writes_again_are_not_doubled(tmp_path):
    run("copy", tmp_path, stop=10)
    for path in persist.checkpoints(tmp_path / "checkpoints")[:1]:
        path.unlink()  # as if it had been killed after step 8's checkpoint
    with (tmp_path / "log.csv").open("a") as f:
        f.write("11,0.5")  # and in the middle of a row
    run("copy", tmp_path, resume=True)
    assert [int(r["step"]) for r in read(tmp_path)] == [3, 6, 9, 12]


def test_the_coach_ratio_falls_below_one_when_the_coach_has_learnt_something():
    options = replace(TINY, steps=150, lr=1e-6, coach_lr=5e-3)
    steps = list(train(*build("copy"), batches, options))
    first, last = (sum(s.logs["coach_ratio"] for s in part) / 10 for part in (steps[:10], steps[-10:]))
    assert last < 0.9 and last < first


# --------------------------------------------------------------------------------------------- regression's cache


def test_pairs_are_where_the_teachers_solver_goes():
    teacher = Mixture(ring(4), 0.1, SCHEDULE)
    options = RegressionOptions(guidance=1.5, solver_steps=6)
    null = {"mode": torch.tensor([-1])}

    def prompts(step, generator):
        return {"cond": {"mode": torch.randint(4, (16,), generator=generator)}, "shape": (16, 2)}

    told = []
    generator, tell = torch.Generator().manual_seed(0), lambda n, seconds: told.append(n)
    pairs = build_pairs(teacher, prompts, options, generator, null=null, count=40, progress=tell)
    assert len(pairs) == 48 and told == [16, 32, 48] and pairs.batch_size == 16
    again = solve(guided(teacher, 1.5, null), pairs.z[:5], {"mode": pairs.cond["mode"][:5]}, steps=6)
    torch.testing.assert_close(pairs.x0[:5], again)
    batch = pairs(0, torch.Generator().manual_seed(1))
    row = (pairs.z == batch["z"][3]).all(1).nonzero().item()
    assert torch.equal(batch["x0"][3], pairs.x0[row]) and batch["cond"]["mode"][3] == pairs.cond["mode"][row]


def test_pairs_within_a_time_and_without_any_budget():
    teacher = Mixture(ring(4), 0.1, SCHEDULE)
    source, g = lambda step, generator: {"cond": None, "shape": (4, 2)}, torch.Generator()
    assert len(build_pairs(teacher, source, RegressionOptions(guidance=1.0), g, seconds=0)) == 4
    with pytest.raises(ValueError, match="count or seconds"):
        build_pairs(teacher, source, RegressionOptions(guidance=1.0), g)


def test_regression_learns_the_solvers_map():
    """The student ends nearer to the pairs than the teacher called once, and covers every mode."""
    teacher = Mixture(ring(4), 0.1, SCHEDULE)
    source = lambda step, generator: {"cond": {"c": torch.zeros(256, 2)}, "shape": (256, 2)}  # noqa: E731
    call = lambda x, t, cond: teacher(x, t)  # noqa: E731
    call.schedule = SCHEDULE
    generator = torch.Generator().manual_seed(0)
    pairs = build_pairs(call, source, RegressionOptions(guidance=1.0, solver_steps=20), generator, count=2000)
    method, student, _ = build("regression")
    options = TrainOptions(steps=400, lr=1e-2, ema=0.9)
    *_, last = train(method, student, None, pairs, options)
    with torch.no_grad():
        x = one_step(make(last.ema))(pairs.z, pairs.cond)
    assert (x - pairs.x0).square().mean() < 0.3 * (one_step(teacher)(pairs.z) - pairs.x0).square().mean()
    assert (torch.bincount(torch.cdist(x, teacher.means).argmin(1), minlength=4) > len(pairs) / 8).all()


def test_neighbouring_seeds_share_nothing():
    draws = torch.stack([torch.randn(1000, generator=seeded("cpu", 0, step, 0, 0)) for step in range(20)])
    assert (torch.corrcoef(draws) - torch.eye(20)).abs().max() < 0.15
    assert seeded("cpu", 1, 2).initial_seed() != seeded("cpu", 2, 1).initial_seed()
