"""Schedules against diffusers' tables and against their own algebra."""

import json

import pytest
import torch

from distill import schedule as S

ALL = [S.ddpm(), S.ddpm(shift=4.0), S.flow(), S.flow(shift=3.0), S.trig(), S.edm()]
T = torch.linspace(0.01, 1, 97)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_ddpm_is_stable_diffusions_table():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    s = S.ddpm()
    t = s.time(torch.arange(1000))
    torch.testing.assert_close(s.alpha(t) ** 2, theirs, rtol=1e-4, atol=1e-6)
    assert s.alpha(torch.ones(1)).item() == pytest.approx(0.0683, abs=1e-4)  # SwiftBrush's constant
    assert torch.equal(s.index(t), torch.arange(1000.0))
    assert s.index(torch.tensor([0.0006, 0.4999])).tolist() == [1, 499]  # the nearest


def test_flow_shift_is_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    s = S.flow(shift=3.0)
    t = 1 - torch.arange(1000) / 1000
    torch.testing.assert_close(s.sigma(t), theirs.sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.index(t), theirs.timesteps, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shifted, plain, k", [(S.ddpm(shift=4), S.ddpm(), 4), (S.flow(shift=3), S.flow(), 3)])
def test_shift_multiplies_the_noise_to_signal_ratio(shifted, plain, k):
    t = T[:-1]
    torch.testing.assert_close(
        shifted.sigma(t) / shifted.alpha(t), k * plain.sigma(t) / plain.alpha(t), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("s", ALL, ids=lambda s: str(s.spec))
def test_index_and_time_are_inverse_and_the_spec_round_trips(s):
    again = S.from_spec(json.loads(json.dumps(s.spec)))
    on_grid = s.time(s.index(T))
    torch.testing.assert_close(s.index(on_grid), s.index(T), rtol=1e-5, atol=1e-5)
    for name in ("alpha", "sigma", "index"):
        assert torch.equal(getattr(again, name)(T), getattr(s, name)(T))
    assert again.spec == s.spec
    assert float(s.time(float(s.index(torch.ones(1))))) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("s", ALL, ids=lambda s: str(s.spec))
def test_noise_has_the_stated_levels_and_snr_falls(s):
    g = generator()
    x0, eps = 3 + S.randn((50_000,), g), S.randn((50_000,), g)
    x_t = s.noise(x0, torch.full((50_000,), 0.6), eps)
    alpha, sigma = s.alpha(torch.tensor([0.6])).item(), s.sigma(torch.tensor([0.6])).item()
    assert x_t.mean().item() == pytest.approx(3 * alpha, rel=0.02)
    assert x_t.var().item() == pytest.approx(alpha**2 + sigma**2, rel=0.03)
    assert (s.snr(T).diff() <= 0).all() and s.snr(T)[0] > s.snr(T)[-1]


def test_distributions():
    n, g = 100_000, generator()
    u = S.uniform(0.02, 0.98)(n, g)
    assert u.min() >= 0.02 and u.max() <= 0.98 and u.mean().item() == pytest.approx(0.5, abs=0.01)
    ln = S.logit_normal(-0.4, 1.0)(n, g)
    assert ln.logit().mean().item() == pytest.approx(-0.4, abs=0.02)
    assert ln.logit().std().item() == pytest.approx(1.0, abs=0.02)
    odds = S.shifted(S.logit_normal(), 3.0)(n, g).logit().exp()
    assert odds.log().mean().item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.02)


def test_draws_use_only_the_generator():
    before = torch.random.get_rng_state()
    a, b = S.uniform()(8, generator(1)), S.uniform()(8, generator(1))
    assert torch.equal(a, b) and torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "spec, word", [({"kind": "cosine"}, "cosine"), ({"kind": "flow", "shfit": 3}, "shfit"), ({}, "None")]
)
def test_a_wrong_spec_names_what_is_wrong(spec, word):
    with pytest.raises(ValueError, match=word):
        S.from_spec(spec)


@pytest.mark.parametrize("curve", ["linear", "scaled_linear"])
def test_curves_of_betas_are_diffusers(curve):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule=curve).alphas_cumprod
    schedule = S.from_spec({"kind": "ddpm", "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": curve})
    assert S.from_spec(schedule.spec).spec == schedule.spec
    ours = schedule.alpha(schedule.time(torch.arange(1000.0))) ** 2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="'cosine' is not one of scaled_linear, linear"):
        S.from_spec({"kind": "ddpm", "beta_schedule": "cosine"})
