"""Samplers against diffusers' schedulers, and one-step calls against the formula."""

import pytest
import torch

from distill import schedule as S
from distill.denoiser import from_net
from distill.sample import diffusers_scheduler, few_step, one_step, solve, solve_from, through_diffusers, trailing
from distill.toy import Gaussian, Mixture, ring


def mixture(schedule):
    return Mixture(ring(5), 0.1, schedule)


def z(n=64, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("steps", [4, 20])
def test_solvers_equal_diffusers(name, shift, steps):
    teacher = mixture(S.ddpm(shift=shift))
    scheduler = diffusers_scheduler(teacher, name)
    theirs = through_diffusers(teacher, scheduler, z(), steps=steps)
    times = [teacher.schedule.time(float(i)) for i in scheduler.timesteps]
    ours = solve(teacher, z(), solver=name, times=times)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_on_a_flow_schedule_is_diffusers_euler(shift):
    teacher = mixture(S.flow(shift=shift))
    scheduler = diffusers_scheduler(teacher, "flow")
    theirs = through_diffusers(teacher, scheduler, z(), steps=12)
    times = [teacher.schedule.time(float(i)) for i in scheduler.timesteps]
    torch.testing.assert_close(solve(teacher, z(), solver="ddim", times=times), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", [S.ddpm(), S.flow(), S.trig(), S.edm()], ids=lambda s: s.name)
@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_solvers_reach_the_data(schedule, solver):
    """All modes of the mixture, and the spread within them, from any schedule; 2M needs far fewer steps."""
    teacher = Mixture(ring(5, radius=2), 0.2, schedule)
    times = torch.linspace(1, 0.003, 200 if solver == "ddim" else 50)  # to t near 0: the last step is a mean
    x = solve(teacher, z(2000), solver=solver, times=times.tolist())
    distance = torch.cdist(x, teacher.means)
    nearest = distance.argmin(1)
    assert (torch.bincount(nearest, minlength=5) > 300).all()
    within = (x - teacher.means[nearest]).square().mean().sqrt()
    assert within.item() == pytest.approx(0.2, rel=0.1)


def test_a_solver_goes_on_from_the_middle():
    """From noised data on: back near where it was, spread as the data are."""
    teacher = Mixture(ring(5, radius=2), 0.2, S.flow())
    x0 = teacher.means[torch.arange(2000) % 5] + 0.2 * z(2000)
    x_t = teacher.schedule.noise(x0, torch.full((2000,), 0.3), z(2000).flip(0))
    x = solve_from(teacher, x_t, torch.linspace(0.3, 0.003, 20).tolist())
    nearest = torch.cdist(x, teacher.means).argmin(1)
    assert (x - x0).square().mean() < (x_t - x0).square().mean() / 2
    assert (x - teacher.means[nearest]).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


def test_dpm_is_second_order():
    """Against the exact flow of a Gaussian: halving the step quarters the error (DDIM: halves it)."""
    schedule = S.flow()
    teacher = Gaussian(0.5, 0.6, schedule)
    start = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]

    def error(solver, steps):
        grid, seen = torch.linspace(0.9, 0.1, steps + 1), []
        solve(teacher, start, solver=solver, times=grid.tolist(), callback=lambda i, x0: seen.append(x0))
        alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
        spread = ((alpha * 0.6) ** 2 + sigma**2).sqrt()  # the flow keeps (x_t - alpha m) / spread
        first = (alpha[0] ** 2 + sigma[0] ** 2).sqrt() * start
        exact = alpha[-1] * 0.5 + spread[-1] / spread[0] * (first - alpha[0] * 0.5)
        return (seen[-1] - teacher(exact, grid[-1].repeat(8))).abs().max().item()

    assert 1.7 < error("ddim", 25) / error("ddim", 50) < 2.3
    assert 3.3 < error("dpm++", 25) / error("dpm++", 50) < 4.7
    assert error("dpm++", 25) < error("ddim", 25) / 5


@pytest.mark.parametrize("native", [999, 399])
def test_one_step_is_swiftbrushs_line(native):
    """x0 = (z - sigma eps) / alpha with z of unit variance, whatever t_in."""
    schedule, heard = S.ddpm(), []

    def net(x, index, cond):
        heard.append(index)
        return torch.tanh(x)

    g = one_step(from_net(net, schedule, "eps"), schedule.time(native))
    alpha, sigma = schedule.alpha(torch.tensor(native / 999)), schedule.sigma(torch.tensor(native / 999))
    torch.testing.assert_close(g(z(), None), (z() - sigma * torch.tanh(z())) / alpha, rtol=1e-4, atol=1e-4)
    assert (heard[0] == native).all()


def test_one_step_equals_a_one_step_solver_of_diffusers():
    teacher = mixture(S.ddpm())
    scheduler = diffusers_scheduler(teacher, "dpm++")
    theirs = through_diffusers(teacher, scheduler, z(), steps=1)
    torch.testing.assert_close(one_step(teacher)(z(), None), theirs, rtol=1e-4, atol=1e-4)


def test_one_step_scales_the_noise_where_the_schedule_is_not_unit_variance():
    schedule = S.edm()
    g = one_step(from_net(lambda x, i, c: x, schedule, "x0"))
    torch.testing.assert_close(g(z(), None), z() * (1 + 80.0**2) ** 0.5)


def test_few_step_renoises_between_predictions():
    teacher = Gaussian(0.5, 0.1, S.flow())
    generator = torch.Generator().manual_seed(0)
    x = few_step(teacher, [1.0, 0.7, 0.3])(z(4000), None, generator)
    assert x.mean().item() == pytest.approx(0.5, abs=0.01)
    assert one_step(teacher)(z(4000), None).std() < 0.01 < x.std()  # one step of a teacher is the mean of the data
    assert torch.equal(few_step(teacher, [1.0])(z(), None), one_step(teacher)(z(), None))


def test_trailing_starts_at_the_noisiest():
    assert trailing(4) == [1.0, 0.75, 0.5, 0.25]
