"""Losses against gradients written by hand."""

import pytest
import torch

from distill import losses as L
from distill import schedule as S
from distill.denoiser import from_x0


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_surrogates_gradient_is_g_over_n():
    x, g = randn(4, 3, 2).requires_grad_(), randn(4, 3, 2, seed=1)
    loss = L.surrogate(x, g)
    loss.backward()
    torch.testing.assert_close(x.grad, g / x.numel())
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item(), rel=1e-5)


def test_matching_gradient_is_fp32_and_finite():
    a, b = torch.ones(2, 3).bfloat16(), torch.full((2, 3), 3.0).bfloat16()
    b[0, 0], b[0, 1] = float("nan"), float("inf")
    g = L.matching_gradient(a, b, torch.full((2, 1), 2.0))
    assert g.dtype == torch.float32 and g.tolist() == [[0, 0, 4], [4, 4, 4]]


def test_the_weights_are_those_of_the_papers():
    x, x0_T, x0_C = randn(4, 2, 3), randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2)
    schedule, t = S.ddpm(), torch.tensor([0.2, 0.5, 0.8, 0.95])
    alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
    x_t = alpha * x + sigma * randn(4, 2, 3, seed=3)
    eps_T, eps_C = (from_x0(d, x_t, t, schedule, "eps") for d in (x0_T, x0_C))
    swiftbrush = L.matching_gradient(x0_T, x0_C, L.WEIGHTS["swiftbrush"](x, x0_T, alpha, sigma))
    torch.testing.assert_close(swiftbrush, sigma**2 * (eps_T - eps_C), rtol=1e-4, atol=1e-4)
    p_real, p_fake = x - x0_T, x - x0_C  # DMD2's own letters
    dmd = L.matching_gradient(x0_T, x0_C, L.WEIGHTS["dmd"](x, x0_T, alpha, sigma))
    torch.testing.assert_close(dmd, (p_real - p_fake) / p_real.abs().mean((1, 2), keepdim=True), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(L.matching_gradient(x0_T, x0_C, L.WEIGHTS["one"](x, x0_T, alpha, sigma)), x0_C - x0_T)
    assert all(torch.broadcast_shapes(w(x, x0_T, alpha, sigma).shape, x.shape) == x.shape for w in L.WEIGHTS.values())


def test_coach_weights_in_eps_form():
    x0, x0_hat, eps = randn(4, 6), randn(4, 6, seed=1), randn(4, 6, seed=2)
    schedule, t = S.ddpm(), torch.tensor([0.2, 0.5, 0.8, 0.95])
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    eps_hat = from_x0(x0_hat, alpha * x0 + sigma * eps, t, schedule, "eps")
    for name, expected in {
        "eps": (eps - eps_hat).square(),
        "swiftbrush": alpha**2 * (eps - eps_hat).square(),
        "one": (x0 - x0_hat).square(),
        "edm": ((alpha / sigma) ** 2 + 4) * (x0 - x0_hat).square(),
        "clamped": (1 + schedule.snr(t)[:, None]).clamp(max=5) * (x0 - x0_hat).square(),
    }.items():
        loss = L.denoising(x0_hat, x0, L.COACH_WEIGHTS[name](alpha, sigma))
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-3), name


def test_regression_is_the_root_mean_square_of_each_sample():
    x, y = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    expected = sum((a - b).square().mean().sqrt() for a, b in zip(x, y)) / 3
    torch.testing.assert_close(L.regression(x, y), expected)
    x.requires_grad_()
    L.regression(x, x.detach().clone()).backward()  # a perfect sample must not give nan
    assert x.grad.isfinite().all()


def test_health_reads_zero_at_the_start_and_one_for_sds():
    x, x0_T = randn(8, 2, 4, 4), randn(8, 2, 4, 4, seed=1)
    start, sds = L.health(x, x0_T, x0_T), L.health(x, x0_T, x)
    assert start["rel_gap"] == 0 and sds["rel_gap"] == 1
    assert sds["cosine"].item() == pytest.approx(1)
    assert L.health(x, x0_T, 2 * x0_T - x)["cosine"].item() == pytest.approx(-1)
    torch.testing.assert_close(start["x_mean_1"], x[:, 1].mean())
    torch.testing.assert_close(start["x_std_0"], x[:, 0].std())
