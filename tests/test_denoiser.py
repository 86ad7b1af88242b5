"""Prediction types and guidance, on an analytic mixture whose E[x0 | x_t] is known exactly."""

import pytest
import torch

from distill import schedule as S
from distill.denoiser import PREDICTIONS, autoguided, diffusers_net, drop, from_net, from_x0, guided, to_x0, with_plain
from distill.toy import Mixture, ring

SCHEDULES = [S.ddpm(), S.ddpm(shift=4.0), S.flow(shift=3.0), S.trig(), S.edm()]
CASES = [(s, p) for s in SCHEDULES for p in PREDICTIONS if p != "trig" or s.name == "trig"]


def points(schedule, n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    t = 0.05 + 0.9 * S.rand((n,), g)
    teacher = Mixture(ring(5), 0.1, schedule)
    x0 = teacher.sample(n, g)
    eps = S.randn((n, 2), g)
    return teacher, t, x0, eps, schedule.noise(x0, t, eps)


@pytest.mark.parametrize("schedule, prediction", CASES, ids=lambda v: v if isinstance(v, str) else v.name)
def test_conversions_round_trip_on_an_analytic_teacher(schedule, prediction):
    """A net that says exactly what this prediction type should say makes the exact denoiser again."""
    teacher, t, _, _, x_t = points(schedule)
    x0 = teacher(x_t, t)

    def net(scaled, index, cond):  # hears the index, not t
        heard = schedule.time(index)
        scale = PREDICTIONS[prediction](schedule.alpha(heard), schedule.sigma(heard))[2]
        x = scaled / (scale[:, None] if torch.is_tensor(scale) else scale)
        return from_x0(teacher(x, heard), x, heard, schedule, prediction)

    torch.testing.assert_close(from_net(net, schedule, prediction)(x_t, t, None), x0, rtol=2e-3, atol=2e-3)
    raw = from_x0(x0, x_t, t, schedule, prediction)
    torch.testing.assert_close(to_x0(raw, x_t, t, schedule, prediction), x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_the_predictions_are_what_the_papers_call_them(schedule):
    """Written out from the noise itself, not from the coefficients."""
    _, t, x0, eps, x_t = points(schedule)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    truth = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    s, sd = sigma / alpha, 0.5
    truth["edm"] = (x0 - sd**2 / (s**2 + sd**2) * x_t / alpha) / (s * sd / (s**2 + sd**2).sqrt())
    if schedule.name == "trig":  # the derivative of the path by its angle, over sigma_data
        angle = schedule.index(t)[:, None]
        truth["trig"] = (angle.cos() * sd * eps - angle.sin() * x0) / sd
    for prediction, value in truth.items():
        torch.testing.assert_close(from_x0(x0, x_t, t, schedule, prediction), value, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_nets_of_edm_and_trigflow_see_inputs_of_unit_spread(schedule):
    """For data of spread sigma_data, what reaches the net has spread 1 at every t; the others see x_t as it is."""
    t = torch.linspace(0.05, 0.95, 7)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    spread = ((0.5 * alpha) ** 2 + sigma**2).sqrt()
    torch.testing.assert_close(PREDICTIONS["edm"](alpha, sigma)[2] * spread, torch.ones(7))
    if schedule.name == "trig":
        torch.testing.assert_close(PREDICTIONS["trig"](alpha, sigma)[2] * spread, torch.ones(7))
    assert all(PREDICTIONS[p](alpha, sigma)[2] == 1 for p in ("x0", "eps", "v", "flow"))


def test_differences_of_predictions_are_differences_of_x0():
    schedule = S.ddpm()
    _, t, x0, _, x_t = points(schedule)
    other = x0 + 0.1
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    for prediction, factor in {"eps": alpha / sigma, "v": 1 / sigma}.items():
        gap = from_x0(x0, x_t, t, schedule, prediction) - from_x0(other, x_t, t, schedule, prediction)
        torch.testing.assert_close(gap, factor * (other - x0), rtol=1e-3, atol=1e-3)


def test_the_mixture_is_the_posterior_mean():
    """Against brute force: E[x0 | x_t] is the minimiser of the square, so the residual is orthogonal to any f(x_t)."""
    schedule = S.flow()
    teacher, _, x0, _, _ = points(schedule, n=200_000)
    g = torch.Generator().manual_seed(1)
    t = torch.full((len(x0),), 0.5)
    x_t = schedule.noise(x0, t, S.randn(x0.shape, g))
    residual = x0 - teacher(x_t, t)
    for f in (torch.ones_like(x_t), x_t, x_t.sin(), x_t**2):
        assert (residual * f).mean().abs() < 3e-3


def test_guidance_is_one_doubled_batch_and_the_formula():
    schedule, calls = S.flow(), []
    teacher, t, _, _, x_t = points(schedule)
    mode = torch.arange(64) % 5
    null = {"mode": torch.tensor([-1])}

    def spy(x, t, cond):
        calls.append(len(x))
        return teacher(x, t, cond)

    spy.schedule = schedule
    given, unknown = teacher(x_t, t, {"mode": mode}), teacher(x_t, t)
    w = torch.linspace(1, 4, 64)
    torch.testing.assert_close(guided(spy, w, null)(x_t, t, {"mode": mode}), unknown + w[:, None] * (given - unknown))
    assert calls == [128]
    torch.testing.assert_close(guided(spy, 2.0, null)(x_t, t, {"mode": mode}), 2 * given - unknown)
    early = guided(spy, w, null, until=0.5)(x_t, t, {"mode": mode})
    torch.testing.assert_close(early, torch.where(t[:, None] <= 0.5, unknown + w[:, None] * (given - unknown), given))
    calls.clear()
    late = guided(spy, w, null, until=0.5)(x_t, torch.full_like(t, 0.6), {"mode": mode})
    torch.testing.assert_close(late, teacher(x_t, torch.full_like(t, 0.6), {"mode": mode}))
    assert calls == [64], "where nothing is guided the empty prompt is not asked"
    assert guided(spy, 1.0, None) is spy
    with pytest.raises(ValueError, match="null"):
        guided(spy, 2.0, None)


def test_autoguidance_adds_to_guidance():
    def weak(x_t, t, cond):
        return 3.0 + 0 * x_t

    def net(x_t, t, cond):
        return cond["c"] * torch.ones_like(x_t)

    x_t, t = torch.zeros(2, 4), torch.full((2,), 0.5)
    cond, null = {"c": torch.full((2, 1), 5.0)}, {"c": torch.ones(1, 1)}
    both = autoguided(guided(net, 1.5, null), 2.0, weak)
    x0, plain = with_plain(both, x_t, t, cond)
    assert (plain == 5).all() and (x0 == 1 + 1.5 * (5 - 1) + (5 - 3)).all()  # the weak net against the plain one
    assert (both(x_t, t, cond) == x0).all()
    assert autoguided(net, 1.0, None) is net
    with pytest.raises(ValueError, match="weaker teacher"):
        autoguided(net, 2.0, None)


def test_drop_replaces_whole_rows_by_the_null_prompt():
    cond = {"a": torch.ones(3, 2, 4), "b": torch.ones(3, 5)}
    null = {"a": torch.zeros(1, 2, 4), "b": torch.full((1, 5), -1.0)}
    out = drop(cond, null, torch.tensor([True, False, True]))
    assert out["a"][:, 0, 0].tolist() == [1, 0, 1] and out["b"][:, 0].tolist() == [1, -1, 1]
    assert drop(None, None, torch.tensor([True])) is None


def test_a_diffusers_unet_is_a_net():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=16,
        attention_head_dim=4,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=8,
    )
    d = from_net(diffusers_net(unet), S.ddpm(), "eps")
    cond = {"encoder_hidden_states": torch.randn(2, 3, 16), "class_labels": torch.randn(2, 8)}
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 1.0])
    eps = unet(x_t, torch.tensor([300, 999]), cond["encoder_hidden_states"], class_labels=cond["class_labels"]).sample
    s = d.schedule
    x0 = (x_t - s.sigma(t)[:, None, None, None] * eps) / s.alpha(t)[:, None, None, None]
    torch.testing.assert_close(d(x_t, t, cond), x0, rtol=1e-4, atol=1e-4)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="epsilon"):
        from_net(lambda x, i, c: x, S.flow(), "epsilon")(torch.zeros(1, 2), torch.ones(1), None)
