"""The loop: what a step changes and when."""

import copy
import itertools
import math
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from small_runs import TINY, Net, assert_same, batches, build, run

from distill.backbones import load
from distill.methods.sds import SDSOptions
from distill.methods.vsd import VSDOptions
from distill.student import StudentOptions
from distill.training import store
from distill.training.batches import prompt_batches
from distill.training.loop import seeded, train
from distill.training.optimizers import state_tensors
from distill.training.options import TrainOptions
from distill.training.state import Run
from distill.training.students import train_student


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


def test_what_parameters_share_of_an_optimiser_is_saved_for_each(tmp_path):
    """bitsandbytes' tables of eight-bit numbers."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer, table = torch.optim.AdamW(params), torch.arange(4.0)
    for p in params:
        optimizer.state[p] = {"step": 3, "qmap1": table, "state1": torch.rand(2)}
    kept = state_tensors(optimizer)
    store.save(tmp_path, 3, kept, {}, keep=1)
    again = store.load(tmp_path)[0]
    assert again.keys() == {f"{i}/{name}" for i in (0, 1) for name in ("step", "qmap1", "state1")}
    assert all(torch.equal(again[name], v) for name, v in kept.items()) and torch.equal(again["1/qmap1"], table)


def test_an_optimiser_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="adamw8bit needs bitsandbytes: pip install bitsandbytes"):
        next(train(build("copy"), batches, replace(TINY, optimizer="adamw8bit")))


def test_a_student_with_nothing_to_train_is_refused():
    method = build("copy")
    method.student.module.requires_grad_(False)
    with pytest.raises(ValueError, match="copy it before"):
        next(train(method, batches, TINY))


def test_neighbouring_seeds_share_nothing():
    draws = torch.stack([torch.randn(1000, generator=seeded("cpu", 0, step, 0, 0)) for step in range(20)])
    assert (torch.corrcoef(draws) - torch.eye(20)).abs().max() < 0.15
    assert seeded("cpu", 1, 2).initial_seed() != seeded("cpu", 2, 1).initial_seed()
