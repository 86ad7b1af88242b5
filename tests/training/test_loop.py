"""The loop: what it changes and when."""

import copy
import csv
import itertools
import math
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from small_runs import SCHEDULE, TINY, Net, assert_same, batches, build, contents, make, run

from distill.backbones import load
from distill.denoiser import guided
from distill.methods.pairs import build_pairs
from distill.methods.sds import SDSOptions
from distill.methods.vsd import VSDOptions
from distill.sample import one_step, solve
from distill.student import StudentOptions
from distill.toy import Mixture, ring
from distill.training import store
from distill.training.batches import prompt_batches
from distill.training.loop import Diverged, seeded, train
from distill.training.options import TrainOptions
from distill.training.state import Run
from distill.training.students import train_student

# --------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("readout, word", [("student_loss", "lower lr"), ("coach_loss", "coach_lr")])
def test_nan_stops_with_the_readout_and_a_cure(tmp_path, readout, word):
    method = build("copy")
    name, steps = readout, []
    loss = getattr(method, name)

    def poisoned(batch, generator):
        value, logs = loss(batch, generator)
        return (value * torch.nan, logs | {name: logs[name] * torch.nan}) if len(steps) == 5 else (value, logs)

    setattr(method, name, poisoned)
    with pytest.raises(Diverged, match=f"step 6: {readout} is nan. Likely cure: .*{word}") as caught:
        for step in train(method, batches, TINY, tmp_path):
            steps.append(step)
    assert caught.value.readout == readout and word in caught.value.cure
    assert contents(tmp_path)[2] == "step-00000004.safetensors"  # the last good one, and nothing after it
    assert all(v.isfinite().all() for v in contents(tmp_path)[0].values())


def test_samples_that_fly_apart_stop_it():
    with pytest.raises(Diverged, match="x_std is .*coach_steps"):
        run("copy", options=replace(TINY, max_spread=0.01))


def test_weights_that_exploded_never_enter_the_average(tmp_path):
    """A step that is finite itself destroys the student; what a resumed run had stays what it was."""
    run("copy", tmp_path, stop=6)
    good = contents(tmp_path)[0]
    with pytest.raises(Diverged):
        run("copy", tmp_path, replace(TINY, save_every=1), resume=True, lr=1e12)
    bad = contents(tmp_path)[0]
    assert all(torch.equal(bad[k], good[k]) for k in good if k.startswith("student_average"))
    method = build("regression", lr=1e4)
    start = copy.deepcopy(method.student.module.mlp.state_dict())
    with pytest.raises(Diverged):
        for step in train(method, batches, TINY):
            average = step.ema
            assert method.student.module.mlp.layers[0].weight.abs().max() > 100  # it has exploded already
    assert all(torch.equal(v, start[k]) for k, v in average.mlp.state_dict().items())


def test_a_method_without_a_coach_is_not_told_to_mind_its_coach():
    with pytest.raises(Diverged, match="Likely cure: lower lr[.]"):
        run("regression", options=replace(TINY, max_spread=1e-4))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"steps": 0}, "steps is 0: 1 or more"),
        ({"steps": -5}, "steps is -5: 1 or more"),
        ({"steps": None}, "give steps or minutes"),
        ({"minutes": 0}, "minutes is 0: above 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        TrainOptions(**wrong)


# -------------------------------------------------------------------------------------------------- what a step does


def moved(before, module):
    return any(not torch.equal(a, b) for a, b in zip(before.parameters(), module.parameters()))


def test_the_coach_warms_up_alone():
    method = build("copy", coach_warmup=3)
    student, coach = method.student.module, method.coach
    start = copy.deepcopy(student), copy.deepcopy(coach.module["coach"])
    for step in train(method, batches, TINY):
        assert moved(start[0], student) == (step.step > 3) and moved(start[1], coach.module["coach"])
        assert ("student_loss" in step.logs) == (step.step > 3)
    assert not moved(coach.module["teacher"], Net())


def test_coach_steps_and_accumulation_are_counted():
    calls = []
    method = build("copy", coach_steps=3)
    for name in ("student_loss", "coach_loss"):
        loss = getattr(method, name)
        setattr(method, name, lambda b, g, loss=loss, name=name: (calls.append(name), loss(b, g))[1])
    next(train(method, batches, replace(TINY, accumulate=2)))
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
    state, rates = Run(build("copy"), replace(TINY, steps=100, lr_warmup=9, lr_end=0.1)), []
    for state.step in range(101):
        state.set_lr()
        rates.append([o.param_groups[0]["lr"] for o in state.optimizers.values()])
    student_lr, coach_lr = zip(*rates)
    assert student_lr[0] == pytest.approx(1e-4) and student_lr[9:51] == (1e-3,) * 42
    assert student_lr[75] == pytest.approx(0.55e-3) and student_lr[100] == pytest.approx(1e-4)
    assert [2 * a for a in student_lr] == pytest.approx(coach_lr)


def test_ema_is_the_warmed_up_average():
    """Of the weights that were seen to be good: those each step began with."""
    seen, method = 0, build("copy")
    student = method.student.module
    expected = before = [p.detach().clone() for p in student.parameters()]
    for step in train(method, batches, replace(TINY, ema=0.5)):
        seen += 1
        decay = min(0.5, (1 + seen) / (10 + seen))
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, before)]
        before = [p.detach().clone() for p in student.parameters()]
        for e, p in zip(expected, step.ema.parameters()):
            torch.testing.assert_close(e, p)
    assert not step.ema.training and not any(p.requires_grad for p in step.ema.parameters())


def test_buffers_follow_and_no_average_costs_no_memory():
    class Counting(Net):
        def forward(self, x, index, cond):
            self.calls += 1
            return super().forward(x, index, cond)

    method = build("regression")
    method.student.module.__class__ = Counting
    *_, last = train(method, batches, TINY)
    assert 0 < last.ema.calls <= last.student.calls
    *_, last = train(build("regression"), batches, replace(TINY, ema=None))
    assert last.ema is last.student


def test_a_time_budget_ends_the_run_and_drives_the_rate(monkeypatch):
    ticks = itertools.count(start=100.0, step=0.03)  # one a step: 0.03 s each
    monkeypatch.setattr("distill.training.loop.time.monotonic", lambda: next(ticks))
    steps = list(train(build("copy"), batches, replace(TINY, steps=None, minutes=1 / 60)))
    assert len(steps) == 34 and steps[-1].seconds == pytest.approx(1.02)
    progress = [s.progress for s in steps]
    assert progress == sorted(progress) and progress[-1] == 1 and steps[-1].remaining == 0
    middle = steps[len(steps) // 2]
    assert middle.remaining == pytest.approx(1 - middle.seconds)


def test_bf16_is_inside_the_nets_only():
    """Weights, moments and losses stay fp32; the run is near the fp32 run, and not the same."""
    dtypes, results = set(), {}
    for precision in ("no", "bf16"):
        method = build("lora")
        student = method.student.module
        student.mlp.layers[0].register_forward_hook(lambda m, i, out: dtypes.add(out.dtype))
        *_, last = train(method, batches, replace(TINY, precision=precision, steps=3))
        results[precision] = torch.cat([p.detach().flatten() for p in student.parameters()])
        assert results[precision].dtype == torch.float32 and last.logs["x_std"] > 0
    assert dtypes == {torch.float32, torch.bfloat16}
    assert not torch.equal(*results.values())
    torch.testing.assert_close(*results.values(), rtol=0, atol=0.01)


def test_checkpointed_activations_change_no_gradient_and_hold_less(tmp_path):
    """On the tiny Stable Diffusion's net, through the loop; what autograd keeps for the way back is weighed."""
    teacher, weighed, ends = load(tiny.stable_diffusion(tmp_path)), [], []
    prompts = prompt_batches(teacher, ["a red ring", "a blue square"], 2)
    for on in (False, True):
        kept = []
        options = TrainOptions(steps=2, gradient_checkpointing=on, max_spread=1e3)
        steps = train_student(teacher, SDSOptions(lr=1e-4), prompts, options)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.nbytes), t)[1], lambda t: t):
            *_, last = steps
        weighed.append(sum(kept))
        ends.append(torch.cat([p.detach().flatten() for p in last.student.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
    assert weighed[1] < 0.5 * weighed[0]
    with pytest.raises(ValueError, match="gradient_checkpointing is True: the student is no net of diffusers"):
        next(train(build("copy"), batches, replace(TINY, gradient_checkpointing=True)))


def test_frozen_weights_may_be_halves_and_what_is_trained_never_is(tmp_path):
    teacher = load(tiny.stable_diffusion(tmp_path), dtype=torch.bfloat16)
    prompts = prompt_batches(teacher, ["a red ring"], 2)
    options = VSDOptions(rank=2, guidance=2.0)
    for form in ("full", "lora"):
        *_, last = train_student(
            teacher, options, prompts, TrainOptions(steps=2, max_spread=1e3, precision="bf16"),
            student=StudentOptions(student=form, student_rank=2),
        )  # fmt: skip
        kinds = [p.dtype for p in last.student.parameters() if p.requires_grad]
        assert set(kinds) == {torch.float32} and math.isfinite(last.logs["student_loss"])
        halves = [p.dtype is torch.bfloat16 for p in last.student.parameters()]
        assert any(halves) == (form == "lora")
        assert {p.dtype for p in teacher.net.parameters()} == {torch.bfloat16}


def test_a_launch_of_another_engine_is_refused(monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="distributed_type is 'DEEPSPEED': launch with --multi_gpu, or --use_fsdp"):
        next(train(build("copy"), batches, TINY))


def test_an_average_on_the_cpu_is_the_same_average():
    plain, there = (run("copy", options=replace(TINY, ema_on_cpu=on)) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain.ema.parameters(), there.ema.parameters()))
    assert {p.device.type for p in there.ema.parameters()} == {"cpu"}


@pytest.mark.slow
def test_a_compiled_run_is_near_the_plain_one():
    ends = []
    for compiled in (False, True):
        *_, last = train(build("regression"), batches, replace(TINY, steps=3, compile=compiled))
        ends.append(torch.cat([p.detach().flatten() for p in last.student.parameters()]))
        assert set(last.student.state_dict()) == set(Net().state_dict())
        assert (last.student._compiled_call_impl is not None) == compiled
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_moments_of_eight_bits_are_resumed(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    options = replace(TINY, optimizer="adamw8bit")
    run("regression", tmp_path / "straight", options)
    run("regression", tmp_path / "halted", options, stop=6)
    run("regression", tmp_path / "halted", options, resume=True)
    assert_same(tmp_path / "straight", tmp_path / "halted")


def test_an_optimiser_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="adamw8bit needs bitsandbytes: pip install bitsandbytes"):
        next(train(build("copy"), batches, replace(TINY, optimizer="adamw8bit")))


def test_a_student_with_nothing_to_train_is_refused():
    method = build("copy")
    method.student.module.requires_grad_(False)
    with pytest.raises(ValueError, match="copy it before"):
        next(train(method, batches, TINY))


# ------------------------------------------------------------------------------------------------------- readouts


def read(out):
    with (out / "log.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_csv_and_tensorboard_hold_the_coachs_health(tmp_path):
    steps = list(train(build("lora", coach_warmup=4), batches, TINY, tmp_path))
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
    for path in store.checkpoints(tmp_path / "checkpoints")[:1]:
        path.unlink()  # as if it had been killed after step 8's checkpoint
    with (tmp_path / "log.csv").open("a") as f:
        f.write("11,0.5")  # and in the middle of a row
    run("copy", tmp_path, resume=True)
    assert [int(r["step"]) for r in read(tmp_path)] == [3, 6, 9, 12]


def test_the_coach_ratio_falls_below_one_when_the_coach_has_learnt_something():
    steps = list(train(build("copy", lr=1e-6, coach_lr=5e-3), batches, replace(TINY, steps=150)))
    first, last = (sum(s.logs["coach_ratio"] for s in part) / 10 for part in (steps[:10], steps[-10:]))
    assert last < 0.9 and last < first


# --------------------------------------------------------------------------------------------- regression's cache


def test_pairs_are_where_the_teachers_solver_goes():
    teacher = guided(Mixture(ring(4), 0.1, SCHEDULE), 1.5, {"mode": torch.tensor([-1])})

    def prompts(step, generator):
        return {"cond": {"mode": torch.randint(4, (16,), generator=generator)}, "shape": (16, 2)}

    told = []
    generator, tell = torch.Generator().manual_seed(0), lambda what, share: told.append(share)
    pairs = build_pairs(teacher, prompts, generator, steps=6, count=40, told=tell)
    assert len(pairs) == 48 and told == [0.4, 0.8, 1] and pairs.batch_size == 16
    again = solve(teacher, pairs.z[:5], {"mode": pairs.cond["mode"][:5]}, steps=6)
    torch.testing.assert_close(pairs.x0[:5], again)
    batch = pairs(0, torch.Generator().manual_seed(1))
    row = (pairs.z == batch["z"][3]).all(1).nonzero().item()
    assert torch.equal(batch["x0"][3], pairs.x0[row]) and batch["cond"]["mode"][3] == pairs.cond["mode"][row]


def test_pairs_within_a_time_and_without_any_budget():
    teacher = Mixture(ring(4), 0.1, SCHEDULE)
    source, g = lambda step, generator: {"cond": None, "shape": (4, 2)}, torch.Generator()
    assert len(build_pairs(teacher, source, g, seconds=0)) == 4
    with pytest.raises(ValueError, match="count or seconds"):
        build_pairs(teacher, source, g)


def test_regression_learns_the_solvers_map():
    """The student ends nearer to the pairs than the teacher called once, and covers every mode."""
    teacher = Mixture(ring(4), 0.1, SCHEDULE)
    source = lambda step, generator: {"cond": {"c": torch.zeros(256, 2)}, "shape": (256, 2)}  # noqa: E731
    call = lambda x, t, cond: teacher(x, t)  # noqa: E731
    call.schedule = SCHEDULE
    generator = torch.Generator().manual_seed(0)
    pairs = build_pairs(call, source, generator, steps=20, count=2000)
    *_, last = train(build("regression", lr=1e-2), pairs, TrainOptions(steps=400, ema=0.9))
    with torch.no_grad():
        x = one_step(make(last.ema))(pairs.z, pairs.cond)
    assert (x - pairs.x0).square().mean() < 0.3 * (one_step(teacher)(pairs.z) - pairs.x0).square().mean()
    assert (torch.bincount(torch.cdist(x, teacher.means).argmin(1), minlength=4) > len(pairs) / 8).all()


def test_neighbouring_seeds_share_nothing():
    draws = torch.stack([torch.randn(1000, generator=seeded("cpu", 0, step, 0, 0)) for step in range(20)])
    assert (torch.corrcoef(draws) - torch.eye(20)).abs().max() < 0.15
    assert seeded("cpu", 1, 2).initial_seed() != seeded("cpu", 2, 1).initial_seed()
