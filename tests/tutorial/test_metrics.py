"""The figures: against closed forms, and each one sees the fault it is there for."""

import pytest
import torch

from distill.tutorial import metrics, shapes


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


def world(change=lambda images: images):
    """A generator that draws real pictures of the prompts, changed somehow."""

    def generate(prompts, g):
        rows = shapes.sample_attributes(len(prompts), g)
        for row, text in zip(rows, prompts):
            for name, value in shapes.parse(text).items():
                row[shapes.NAMES.index(name)] = shapes.ATTRIBUTES[name].index(value)
        return change(shapes.render(rows, shapes.sample_style(len(rows), g)))

    return generate


def test_bundled_judge_reads_fresh_renders(judge):
    from distill.tutorial.judge import accuracy

    figures = accuracy(judge, n=1024, seed=12345)
    assert all(v > 0.99 for v in figures.values()), figures


def test_real_pictures_are_as_good_as_real(judge):
    report = metrics.evaluate(world(), judge, n=512)
    assert report.accuracy > 0.99 and report.held_out_accuracy > 0.98
    assert report.frechet < 1.5 * report.frechet_floor
    assert 0.9 < report.diversity_ratio < 1.1 and 0.9 < report.entropy_ratio < 1.1
    assert 0.95 < report.sharpness_ratio < 1.05 and report.clean > 0.9
    assert report.short_accuracy > 0.98 and report.short_clean > 0.85


def test_each_fault_shows_in_its_figure(judge):
    def blur(x):
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def noise(x):
        return x + 0.15 * torch.randn(x.shape, generator=generator())

    def collapse(x):
        return x[:1].expand_as(x)

    blurred, noisy, same = (metrics.evaluate(world(f), judge, n=128) for f in (blur, noise, collapse))
    real = metrics.evaluate(world(), judge, n=128)
    assert blurred.sharpness_ratio < 0.7 and noisy.sharpness_ratio > 1.3
    assert noisy.clean < 0.3 and noisy.short_clean < 0.3
    assert same.diversity_ratio < 0.05 and same.entropy_ratio < 0.05 and same.accuracy < 0.1
    assert min(r.frechet for r in (blurred, noisy, same)) > real.frechet


def test_missing_judge_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="distill.tutorial.build judge"):
        metrics.Judge.load(tmp_path / "judge.safetensors")
