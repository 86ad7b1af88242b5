"""Regression's pairs: made once, where the teacher's solver goes; on disk in shards."""

import pytest
import tiny
import torch
from small_runs import SCHEDULE, build, make

from distill import shards
from distill.backbones import load
from distill.denoiser import guided
from distill.methods.pairs import build_pairs
from distill.methods.regression import RegressionOptions
from distill.sample import one_step, solve
from distill.shards import leaves
from distill.toy import Mixture, ring
from distill.training.batches import prompt_batches
from distill.training.loop import train
from distill.training.options import TrainOptions
from distill.training.students import train_student


def test_pairs_are_where_the_teachers_solver_goes():
    teacher = guided(Mixture(ring(4), 0.1, SCHEDULE), 1.5, {"mode": torch.tensor([-1])})

    def prompts(step, generator):
        return {"cond": {"mode": torch.randint(4, (16,), generator=generator)}, "shape": (16, 2)}

    told = []
    generator, tell = torch.Generator().manual_seed(0), lambda what, share: told.append(share)
    pairs = build_pairs(teacher, prompts, generator, steps=6, count=40, told=tell)
    assert len(pairs) == 48 and told == [0.4, 0.8, 1] and pairs.batch_size == 16
    every = pairs.rows[range(48)]
    torch.testing.assert_close(every["x0"], solve(teacher, every["z"], every["cond"], steps=6))
    batch = pairs(0, torch.Generator().manual_seed(1))
    row = (every["z"] == batch["z"][3]).all(1).nonzero().item()
    assert torch.equal(batch["x0"][3], every["x0"][row]) and batch["cond"]["mode"][3] == every["cond"]["mode"][row]


CONDS = {
    "none": lambda mode: None,
    "a tensor": lambda mode: mode,
    "nested": lambda mode: {"mode": mode, "more": [mode[:, None].float(), (mode,)]},
}


@pytest.mark.parametrize("cond", CONDS)
def test_killed_pairs_are_gone_on_with_and_a_damaged_shard_is_named_and_made_again(cond, tmp_path, monkeypatch, caplog):
    """Bitwise what was never stopped; of another guidance or other prompts none is taken."""
    monkeypatch.setattr(shards, "ROWS", 8)
    teacher, asked = Mixture(ring(4), 0.1, SCHEDULE), []
    call = lambda x, t, c: teacher(x, t)  # noqa: E731
    call.schedule = SCHEDULE

    def make(folder, fails=None, modes=4, **how):
        def prompts(step, generator):
            if step == fails:
                raise KeyboardInterrupt
            asked.append(step)
            return {"cond": CONDS[cond](torch.randint(modes, (4,), generator=generator)), "shape": (4, 2)}

        asked.clear()
        return build_pairs(call, prompts, torch.Generator().manual_seed(0), steps=2, count=28, folder=folder, **how)

    def same(a, b):
        return all(map(torch.equal, *(leaves(pairs.rows[range(28)]) for pairs in (a, b))))

    whole, kept = make(None), make(tmp_path)
    assert same(whole, kept) and len(kept) == 28 and asked == [0, *range(7)]
    assert same(make(tmp_path), whole) and asked == [0]
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", fails=5)
    assert same(make(tmp_path / "killed"), whole) and asked == [0, 4, 5, 6]
    path = next(tmp_path.glob("*/000001.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert not caplog.records and same(make(tmp_path), whole) and asked == [0, 2, 3]
    assert f"{path} is damaged" in caplog.text and len(caplog.records) == 1
    make(tmp_path, about=2.0)
    assert len(asked) == 8
    if cond != "none":
        make(tmp_path, modes=2)
        assert len(asked) == 8


def test_pairs_are_made_where_the_teacher_is(tmp_path):
    """The meta device stands for a GPU: noise and conditions, which come from the CPU, are brought there."""
    teacher = load(tiny.write(tmp_path / "t.safetensors", method="teacher", steps=2))
    batches = prompt_batches(teacher, ["a red ring", "a blue square"], 2)
    teacher.move_net("meta")
    training, seen = TrainOptions(steps=1), []
    teacher.net.register_forward_pre_hook(lambda net, given: seen.append([v.device.type for v in given]))
    with pytest.raises(RuntimeError, match="META device"):  # on which nothing can be trained
        next(train_student(teacher, RegressionOptions(pairs=2, solver_steps=1), batches, training, device="meta"))
    assert seen and all(where == ["meta", "meta"] for where in seen)


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
        z, cond, x0 = pairs.rows[range(len(pairs))].values()
        x = one_step(make(last.ema))(z, cond)
    assert (x - x0).square().mean() < 0.3 * (one_step(teacher)(z) - x0).square().mean()
    assert (torch.bincount(torch.cdist(x, teacher.means).argmin(1), minlength=4) > len(pairs) / 8).all()
