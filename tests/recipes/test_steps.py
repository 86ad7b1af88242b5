"""A step of any family: the level it reaches, and how much of the old noise is in it."""

import pytest
import torch

from distill.recipes.steps import DOWN, advance

N = 200_000
SIGNALS = {"sigma / alpha": lambda s: torch.ones_like(s), "flow": lambda s: 1 - s}


def clock(s: torch.Tensor) -> torch.Tensor:
    """Levels that are their own timesteps, in hundredths."""
    return 100 * s


def level(t: torch.Tensor) -> torch.Tensor:
    return t / 100


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(
    ("rule", "eta", "kept"),  # the part of the old noise that must be left, of levels 0.8 -> 0.5, for sigma / alpha
    [("euler", 0.0, 1.0), ("renoise", 0.0, 0.0), ("ancestral", 0.0, 0.5 / 0.8), ("tcd", 0.3, 0.7), ("tcd", 0.0, 1.0)],
)
def test_noise_of_the_next_level_with_the_rule_s_share_of_the_old(signal, rule, eta, kept):
    g = torch.Generator().manual_seed(0)
    now, then = torch.tensor(0.8), torch.tensor(0.5)
    f = SIGNALS[signal]
    x0, eps, fresh = 3.0, torch.randn(N, generator=g), torch.randn(N, generator=g)
    down = DOWN[rule](now, then, eta, clock, level)
    x = advance(f(now) * x0 + now * eps, x0, now, down, then, fresh, f)
    noise = (x - f(then) * x0) / then
    assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)
    expected = float(f(then) / f(down) * down / then)
    assert (noise * eps).mean() == pytest.approx(expected, abs=0.01)
    if signal == "sigma / alpha":
        assert expected == pytest.approx(kept)


def test_tcd_rounds_down_to_a_timestep():
    assert DOWN["tcd"](torch.tensor(0.8), torch.tensor(0.55), 0.3, clock, level) == pytest.approx(0.38)  # 38.5
