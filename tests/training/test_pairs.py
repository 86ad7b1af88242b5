"""Regression's pairs: made once, where the teacher's solver goes."""

import pytest
import torch
from small_runs import SCHEDULE, build, make

from distill.denoiser import guided
from distill.methods.pairs import build_pairs
from distill.sample import one_step, solve
from distill.toy import Mixture, ring
from distill.training.loop import train
from distill.training.options import TrainOptions


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
