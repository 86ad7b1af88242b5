"""VSD and SDS against closed forms (docs/theory.md). Everything goes through the real methods.

Teacher N(m, s^2), student x = mu + tau z, k(v) = alpha^2 v^2 / (alpha^2 v^2 + sigma^2).
"""

import math

import pytest
import torch
from torch import nn

from distill import schedule as S
from distill import toy
from distill.coach import CopyCoach
from distill.methods.sds import SDS, SDSOptions
from distill.methods.vsd import VSD, VSDOptions
from distill.schedule import expand
from distill.toy import Gaussian, Mixture, posterior_mean, ring
from distill.training.loop import train
from distill.training.options import TrainOptions

SD = S.ddpm()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def at(t):
    """A distribution of t that is one number."""
    return lambda n, generator=None, device=None: torch.full((n,), float(t))


def k(schedule, t, v):
    alpha, sigma = (f(torch.tensor([float(t)])).item() for f in (schedule.alpha, schedule.sigma))
    return (alpha * v) ** 2 / ((alpha * v) ** 2 + sigma**2)


class Line(nn.Module):
    """x = mu + tau z"""

    def __init__(self, mu, tau):
        super().__init__()
        self.mu, self.tau = nn.Parameter(torch.tensor(float(mu))), nn.Parameter(torch.tensor(float(tau)))

    def forward(self, z, cond=None):
        return self.mu + self.tau * z


class Exact:
    """A coach that knows the student: the limit of an infinitely fast one."""

    def __init__(self, teacher, of_student):
        self.teacher, self.denoiser = teacher, of_student


class GaussianNet(nn.Module):
    """A trainable Gaussian denoiser: teacher or coach."""

    def __init__(self, mean, std, schedule):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(float(mean))), nn.Parameter(torch.tensor(math.log(std)))
        self.schedule = schedule

    def forward(self, x_t, t, cond=None):
        return Gaussian(self.mean, self.log_std.exp(), self.schedule)(x_t, t)


def descend(method, parameters, steps, lr, batch, seed=0, each=lambda: None):
    """Plain Adam, falling to 0, so that what is tested is the method and not the loop."""
    g, optimizer = generator(seed), torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.99))
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, 2 * (1 - i / steps)))
    for _ in range(steps):
        optimizer.zero_grad()
        method.student_loss(batch, g)[0].backward()
        optimizer.step()
        fall.step()
        each()


# ---------------------------------------------------------------------------------- the gradient, in expectation


@pytest.mark.parametrize("t", [0.2, 0.4, 0.7])
def test_the_gradient_is_the_closed_form(t):
    """E[grad_mu] = (1 - k(s)) (mu - m) and E[grad_tau] = (k(tau) - k(s)) tau, with w = 1."""
    m, s, mu, tau = 2.0, 0.5, 0.5, 1.2
    student = Line(mu, tau)
    coach = Exact(Gaussian(m, s, SD), Gaussian(mu, tau, SD))
    method = VSD(VSDOptions(weight="one", guidance=1.0), student, coach, times=at(t))
    loss, _ = method.student_loss({"cond": None, "shape": (400_000, 1)}, generator())
    loss.backward()
    assert student.mu.grad.item() == pytest.approx((1 - k(SD, t, s)) * (mu - m), abs=0.01)
    assert student.tau.grad.item() == pytest.approx((k(SD, t, tau) - k(SD, t, s)) * tau, abs=0.01)


@pytest.mark.parametrize("guide", ["teacher", "both"])
def test_the_gradient_is_zero_while_the_coach_is_the_teacher(guide):
    teacher = GaussianNet(2.0, 0.5, SD)
    student = Line(0.5, 1.2)
    method = VSD(VSDOptions(guidance=1.0, guide=guide), student, CopyCoach(teacher, lambda net: net))
    loss, logs = method.student_loss({"cond": None, "shape": (64, 1)}, generator())
    loss.backward()
    assert student.mu.grad == 0 and student.tau.grad == 0 and logs["rel_gap"] == 0


# ---------------------------------------------------------------------------------------------- fixed points


@pytest.mark.parametrize("weight", ["one", "swiftbrush", "dmd"])
@pytest.mark.parametrize("schedule", [SD, S.flow(shift=3.0)], ids=lambda s: s.name)
def test_vsd_finds_mean_and_spread(weight, schedule):
    student = Line(-1.0, 1.5)
    coach = Exact(Gaussian(2.0, 0.5, schedule), Gaussian(student.mu, student.tau, schedule))
    method = VSD(VSDOptions(weight=weight, guidance=1.0), student, coach)
    descend(method, student.parameters(), 700, 0.03, {"cond": None, "shape": (64, 16)})  # dmd averages over pixels
    assert student.mu.item() == pytest.approx(2.0, rel=0.01)
    assert student.tau.item() == pytest.approx(0.5, rel=0.02)


def test_autoguidance_goes_on_from_the_weak_teacher_through_the_teacher():
    """Of equal spread, the guided law is N(m_T + (w - 1) (m_T - m_W), s^2)."""
    student = Line(0.0, 1.2)
    coach = Exact(Gaussian(2.0, 0.5, SD), Gaussian(student.mu, student.tau, SD))
    options = VSDOptions(weight="one", guidance=1.0, autoguidance=1.5)
    method = VSD(options, student, coach, weak=Gaussian(1.0, 0.5, SD))
    descend(method, student.parameters(), 700, 0.03, {"cond": None, "shape": (64, 16)})
    assert student.mu.item() == pytest.approx(2.5, rel=0.01)
    assert student.tau.item() == pytest.approx(0.5, rel=0.02)


def test_autoguidance_widens_what_the_weak_teacher_knows_too_narrowly():
    """At one t: k(tau) = w k(s_T) - (w - 1) k(s_W)."""
    t, w, student = 0.3, 1.5, Line(2.0, 0.5)
    coach = Exact(Gaussian(2.0, 0.5, SD), Gaussian(student.mu, student.tau, SD))
    options = VSDOptions(weight="one", guidance=1.0, autoguidance=w)
    method = VSD(options, student, coach, times=at(t), weak=Gaussian(2.0, 0.3, SD))
    descend(method, student.parameters(), 700, 0.03, {"cond": None, "shape": (64, 16)})
    wide = w * k(SD, t, 0.5) - (w - 1) * k(SD, t, 0.3)
    alpha, sigma = (f(torch.tensor([t])).item() for f in (SD.alpha, SD.sigma))
    assert student.tau.item() == pytest.approx(sigma / alpha * math.sqrt(wide / (1 - wide)), rel=0.02)
    assert student.tau.item() > 0.55


def test_autoguidance_without_a_weak_teacher_is_refused():
    coach = Exact(Gaussian(2.0, 0.5, SD), Gaussian(2.0, 0.5, SD))
    with pytest.raises(ValueError, match="weaker teacher"):
        method = VSD(VSDOptions(guidance=1.0, autoguidance=2.0), Line(0.0, 1.0), coach)
        method.student_loss({"cond": None, "shape": (4, 1)}, generator())


def test_vsd_finds_them_with_a_coach_that_has_to_learn():
    student, g = Line(0.0, 1.2), generator(1)
    coach = CopyCoach(GaussianNet(2.0, 0.5, SD), lambda net: net)
    method = VSD(VSDOptions(weight="one", guidance=1.0), student, coach)
    optimizer = torch.optim.Adam(coach.parameters(), lr=0.02)
    batch = {"cond": None, "shape": (512, 1)}

    def coach_steps():
        for _ in range(2):
            optimizer.zero_grad()
            method.coach_loss(batch, g)[0].backward()
            optimizer.step()

    descend(method, student.parameters(), 800, 0.01, batch, each=coach_steps)
    assert student.mu.item() == pytest.approx(2.0, rel=0.01)
    assert student.tau.item() == pytest.approx(0.5, rel=0.02)
    tracked = coach.denoiser
    assert tracked.mean.item() == pytest.approx(2.0, rel=0.02)
    assert tracked.log_std.exp().item() == pytest.approx(0.5, rel=0.05)


def test_sds_collapses():
    """The same teacher without a coach: the mean arrives, the spread goes to zero."""
    student = Line(-1.0, 1.5)
    method = SDS(SDSOptions(guidance=1.0), student, Gaussian(2.0, 0.5, SD))
    assert [phase.net for phase in method.phases(0)] == ["student"] == list(method.nets)
    descend(method, student.parameters(), 600, 0.03, {"cond": None, "shape": (512, 1)})
    assert student.mu.item() == pytest.approx(2.0, rel=0.01)
    assert abs(student.tau.item()) < 0.05


# ------------------------------------------------------------------------------------------------- guidance


class Conditional:
    """x | c ~ N(gain c, std^2), c ~ N(0, 1); where "known" is 0 the condition is the null prompt."""

    def __init__(self, gain, std, schedule):
        self.gain, self.std, self.schedule = gain, std, schedule

    def __call__(self, x_t, t, cond):
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        known = cond["known"]
        spread = (self.std**2 + (1 - known) * self.gain**2) ** 0.5
        return posterior_mean(x_t, alpha, sigma, known * self.gain * cond["c"], spread)


class Slope(nn.Module):
    """x = g c + tau z"""

    def __init__(self, gain, tau):
        super().__init__()
        self.gain, self.tau = nn.Parameter(torch.tensor(gain)), nn.Parameter(torch.tensor(tau))

    def forward(self, z, cond):
        return self.gain * cond["c"] + self.tau * z


TABLE = {1: (1.00, 0.50), 2: (1.44, 0.0), 4.5: (1.92, 0.0), 7.5: (2.14, 0.0)}  # w: gain, spread; teacher only


@pytest.mark.parametrize("w", TABLE)
@pytest.mark.parametrize("guide", ["teacher", "both"])
def test_guidance_on_the_teacher_sharpens_and_on_both_cancels(w, guide):
    """The table of section 1.4, which is SD's t = 399."""
    student, null = Slope(0.7, 0.8), {"c": torch.zeros(1, 1), "known": torch.zeros(1, 1)}
    coach = Exact(Conditional(1.0, 0.5, SD), Conditional(student.gain, student.tau, SD))
    options = VSDOptions(weight="one", guidance=float(w), guide=guide)
    method = VSD(options, student, coach, null, times=at(399 / 999))
    c = torch.randn(2048, 1, generator=generator(3))
    c = (c - c.mean()) / c.std()
    batch = {"cond": {"c": c, "known": torch.ones_like(c)}, "shape": (2048, 1)}
    descend(method, student.parameters(), 500, 0.03, batch)
    gain, tau = TABLE[w] if guide == "teacher" else (1.0, 0.5)
    assert student.gain.item() == pytest.approx(gain, abs=0.02)
    assert abs(student.tau.item()) == pytest.approx(tau, abs=0.02 if tau else 0.1)


def test_random_guidance_lies_between_its_ends():
    method = VSD(VSDOptions(guidance=0.5, guidance_max=4.0), None, Exact(Gaussian(0, 1, SD), None))
    w = method.draw_guidance(torch.zeros(10_000, 1), generator())
    assert w.shape == (10_000,) and 0.5 <= w.min() < 0.51 and 3.99 < w.max() <= 4
    assert w.mean().item() == pytest.approx(2.25, abs=0.05)


# --------------------------------------------------------------------------------- the coach has to be quick enough


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.25, 4.0, 16.0])
def test_overshoot_against_the_coachs_rate(ratio):
    """mu'' + r_c mu' + r_c r_s (mu - m) = 0: a damped swing, overshoot exp(-pi z / sqrt(1 - z^2)), z = sqrt(r_c/r_s)/2.

    So none from r_c = 4 r_s on: DMD2's "smallest ratio at which the brightness is stable".
    """
    t, s, r_s = 0.4, 0.5, 0.01
    stiff = 1 - k(SD, t, s)
    teacher = GaussianNet(0.0, s, SD)
    coach, student = CopyCoach(teacher, lambda net: net), Line(1.0, s)
    options = VSDOptions(weight="one", guidance=1.0, coach_weight="one")
    method = VSD(options, student, coach, times=at(t))
    method.coach_times = at(t)
    batch, g, path = {"cond": None, "shape": (64, 1)}, generator(), []
    for _ in range(1200):
        student_step = torch.autograd.grad(method.student_loss(batch, g)[0], student.mu)[0]
        coach_step = torch.autograd.grad(method.coach_loss(batch, g)[0], coach.denoiser.mean)[0]
        with torch.no_grad():
            student.mu -= r_s / stiff * student_step  # d loss / d mu = stiff * (coach - m)
            coach.denoiser.mean -= ratio * r_s / (2 * stiff**2) * coach_step  # = 2 stiff^2 (coach - mu)
        path.append(student.mu.item())
    z = math.sqrt(ratio) / 2
    expected = math.exp(-math.pi * z / math.sqrt(1 - z * z)) if z < 1 else 0.0
    assert max(0.0, -min(path)) == pytest.approx(expected, abs=0.05)


# ---------------------------------------------------------------------------------------------------- two dimensions


def test_every_mode_of_a_mixture_is_covered():
    """Eight modes, the exact teacher, a coach that has to learn, the real loop: no mode lost, none favoured."""
    teacher = Mixture(ring(8, 2.0), 0.3, S.flow())
    student, coach = toy.Student(generator=generator(2)), toy.Coach(teacher, generator=generator(1))
    method = VSD(VSDOptions(guidance=1.0, lr=5e-3, coach_lr=1e-2, coach_steps=2), student, coach)
    options = TrainOptions(steps=800)
    *_, last = train(method, lambda step, g: {"cond": None, "shape": (256, 2)}, options)
    with torch.no_grad():
        x = last.ema(S.randn((4000, 2), generator(5)))
    distance, mode = torch.cdist(x, teacher.means).min(1)
    share = torch.bincount(mode, minlength=8) / 4000
    assert share.min() > 0.08 and share.max() < 0.17  # 1/8 each
    assert (distance < 3 * teacher.std).float().mean() > 0.85
    assert (x - teacher.means[mode]).square().mean().sqrt().item() == pytest.approx(teacher.std, rel=0.6)
