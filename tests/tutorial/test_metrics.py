"""The figures: against closed forms, and each one sees the fault it is there for."""

import pytest
import torch

from distill.tutorial import metrics, rows, shapes
from distill.tutorial.nearest import nearest_render


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_frechet_of_gaussians_has_its_closed_form():
    g = generator()
    a = torch.randn(200_000, 3, generator=g, dtype=torch.float64)
    b = 2 * torch.randn(200_000, 3, generator=g, dtype=torch.float64) + torch.tensor([3.0, 0, 0])
    assert metrics.frechet(a, b) == pytest.approx(9 + 3 * (2 - 1) ** 2, rel=0.02)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_sees_correlation():
    g = generator()
    a = torch.randn(50_000, 2, generator=g)
    same_marginals = torch.stack([a[:, 0], a[:, 0]], 1)
    assert metrics.frechet(a, same_marginals) > 0.5


def test_entropy_of_open_attributes():
    stated = torch.tensor([[True, True, True, False, True]])
    even = torch.zeros(16, 5, dtype=torch.int64)
    even[::2, 3] = 1
    assert metrics.entropy(even, stated, 1) == pytest.approx(0.6931, abs=1e-3)
    assert metrics.entropy(torch.zeros_like(even), stated, 1) == 0


def test_all_right_ignores_what_was_not_asked():
    read, asked = torch.tensor([[1, 2, 3, 0, 4]]), torch.tensor([[1, 2, 3, 1, 4]])
    assert not metrics.all_right(read, asked)
    assert metrics.all_right(read, asked, torch.tensor([[True, True, True, False, True]]))


@pytest.fixture(scope="module")
def judge():
    return metrics.Judge.load()


@pytest.fixture
def few_groups(monkeypatch):
    monkeypatch.setattr(metrics, "GROUPS", 10)
    monkeypatch.setattr(metrics, "PER_GROUP", 8)


def world(change=lambda images: images):
    """A generator that draws real pictures of the prompts, changed somehow."""
    return lambda prompts, g: change(rows.real_pictures(prompts, g))


def test_bundled_judge_reads_fresh_renders(judge):
    from distill.tutorial.judge import accuracy

    figures = accuracy(judge, n=1024, seed=12345)
    assert all(v > 0.99 for v in figures.values()), figures


def test_nearest_render_finds_the_style_that_was_drawn(judge):
    g = generator(1)
    attributes, style = shapes.sample_attributes(64, g), shapes.sample_style(64, g)
    images = shapes.render(attributes, style)
    found = nearest_render(images, attributes, judge.read(images).style)
    assert found.residual.quantile(0.9) < 5e-3 and not found.none.any()
    turned = ~torch.isin(attributes[:, 0], torch.tensor([0, 4]))  # a circle's or ring's rotation does not show
    assert (found.style - style)[turned].abs().median() < 1e-3


def test_grey_and_blends_of_pictures_show_nothing(judge):
    g = generator(2)
    images = rows.real_pictures(shapes.sample_prompts(64, g), g)
    grey = torch.rand(64, 3, 1, 1, generator=g).expand_as(images) - 0.5
    for mush, share in ((grey, 0.95), ((images + images.roll(1, 0)) / 2, 0.6), (images + 0.3, 0.3)):
        reading = judge.read(mush)
        assert nearest_render(mush, reading.attributes, reading.style).none.float().mean() > share


def test_real_pictures_are_as_good_as_real(judge):
    real, asked = world(), []

    def counted(prompts, generator):
        asked.append(len(prompts))
        return real(prompts, generator)

    report = metrics.evaluate(counted, judge, n=256)
    assert sum(asked) == metrics.pictures(256)
    assert report.accuracy > 0.99 and report.held_out_accuracy > 0.98
    assert report.frechet < 2 * report.frechet_floor
    assert 0.95 < report.style_ratio <= 1 and 0.9 < report.entropy_ratio < 1.1
    assert report.residual < 1e-3 and report.clean > 0.9
    assert report.short_accuracy > 0.98 and report.short_clean > 0.85


def test_each_fault_shows_in_its_figure(judge, few_groups):
    def blur(x):
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def noise(x):
        return x + 0.15 * torch.randn(x.shape, generator=generator())

    def collapse(x):
        return x[:1].expand_as(x)

    def grey(x):
        return 0 * x

    blurred, noisy, same, empty = (metrics.evaluate(world(f), judge, n=64) for f in (blur, noise, collapse, grey))
    real = metrics.evaluate(world(), judge, n=64)
    assert min(blurred.residual, noisy.residual) > 0.02 > 20 * real.residual
    assert noisy.clean < 0.3 and noisy.short_clean < 0.3
    assert same.style_ratio < 0.05 and same.entropy_ratio < 0.05 and same.accuracy < 0.1
    assert empty.accuracy == empty.short_accuracy == empty.style_ratio == empty.entropy_ratio == 0
    assert min(r.frechet for r in (blurred, noisy, same, empty)) > real.frechet


def test_mush_does_not_pass_for_variety():
    style = torch.tensor([[-1.0], [1], [0], [0.0]]).expand(4, 10)
    some = torch.tensor([False, False, True, True])
    assert metrics.style_spread(style, torch.ones(4, dtype=torch.bool), 1)[0] == pytest.approx(0.5**0.5)
    assert metrics.style_spread(style, some, 1).sum() == 0


def test_seeds_give_a_mean_and_a_spread(judge, few_groups):
    report = metrics.evaluate_seeds(world(), judge, n=32, seeds=2)
    low, high = sorted(report["each"]["frechet"])
    assert report["frechet"] == pytest.approx((low + high) / 2, abs=1e-3) and report["n"] == 32
    assert metrics.spread(report, "frechet") == pytest.approx((high - low) / 2, abs=1e-6)
    assert f"{report['frechet']:.3g} ±" in rows.table({"real": report})


def test_missing_judge_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="distill.tutorial.build judge"):
        metrics.Judge.load(tmp_path / "judge.safetensors")
