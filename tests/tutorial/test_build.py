"""What the bundled models are made by: the loop that resumes, the autoencoder's shapes, the teacher's start."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from distill.backbones.patch import PatchAutoencoder
from distill.tutorial import autoencoder, fit, shapes, teacher


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def line_to_learn():
    net = torch.nn.Linear(3, 1)
    torch.manual_seed(0)
    torch.nn.init.normal_(net.weight)
    torch.nn.init.zeros_(net.bias)

    def loss(g):
        x = torch.randn(8, 3, generator=g)
        return (net(x).squeeze(1) - x.sum(1)).square().mean()

    return net, loss


@pytest.fixture
def clock(monkeypatch):
    """A second passes at every look at the clock: a step takes one."""
    ticks = itertools.count()
    monkeypatch.setattr(fit, "time", SimpleNamespace(process_time=lambda: float(next(ticks))))
    monkeypatch.setattr(fit, "SAVE_MINUTES", 0.1)


def trained(minutes, work, stop_after=None):
    net, loss = line_to_learn()
    steps = itertools.count()

    def counted(g):
        if next(steps) == stop_after:
            raise KeyboardInterrupt
        return loss(g)

    return fit.fit(net, counted, minutes, 1e-2, seed=0, name="line", work=work, averages=(0.9, 0.99))


def test_a_stopped_training_goes_on_to_the_same_weights(clock, tmp_path):
    whole = trained(1.0, tmp_path / "whole") if (tmp_path / "whole").mkdir() is None else None
    (tmp_path / "parts").mkdir()
    with pytest.raises(KeyboardInterrupt):
        trained(1.0, tmp_path / "parts", stop_after=30)
    parts = trained(1.0, tmp_path / "parts")
    # the clock counts whole looks: what was lost since the last save is trained again, on the same numbers
    assert torch.allclose(whole[0.9].weight, parts[0.9].weight, atol=2e-2)
    assert trained(1.0, tmp_path / "parts")[0.9].weight.equal(parts[0.9].weight)


def test_more_minutes_go_on_from_before_the_rate_fell(clock, tmp_path, capsys):
    trained(1.0, tmp_path)
    trained(2.0, tmp_path)
    assert "goes on from line.flat.pt" in capsys.readouterr().out
    with pytest.raises(ValueError, match="minutes are behind line"):
        trained(0.5, tmp_path)


def test_half_convolutions_are_near_and_leave_no_trace():
    net, x = torch.nn.Conv2d(4, 4, 3), torch.randn(2, 4, 8, 8, generator=generator())
    whole = net(x)
    with fit.half_convolutions(True):
        half = net(x)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.05
    assert net(x).equal(whole)


@pytest.mark.parametrize("config", [{}, autoencoder.CONFIG, {"factor": 4, "pyramid": (16, 8)}])
def test_autoencoders_fold_and_unfold(config):
    vae = PatchAutoencoder(**config)
    images = torch.randn(2, 3, 64, 64, generator=generator())
    z = vae.encode(images)
    side = 64 // vae.config["factor"]
    assert z.shape == (2, vae.config["channels"], side, side) and vae.decode(z).shape == images.shape
    again = PatchAutoencoder.from_config(vae.config)
    again.load_state_dict(vae.state_dict())
    before = vae.decode(z)
    vae.normalise(images)
    assert torch.allclose(vae.decode(vae.encode(images)), before, atol=1e-3)
    assert torch.allclose(vae.encode(images).std((0, 2, 3)), torch.ones(z.shape[1]), atol=1e-3)


def test_a_pyramid_must_reach_the_pictures():
    with pytest.raises(ValueError, match="factor is 8"):
        PatchAutoencoder(pyramid=(64, 32))


def test_a_grown_teacher_starts_as_the_old_one():
    small = teacher.CONFIG | {"block_out_channels": (32, 32), "in_channels": 4, "out_channels": 4}
    old = UNet2DConditionModel(**small | {"layers_per_block": (1, 1)}).eval()
    new = teacher.grow(UNet2DConditionModel(**small), old).eval()
    x = torch.randn(3, 4, 8, 8, generator=generator())
    cond = {"encoder_hidden_states": torch.randn(3, 32, 128), "class_labels": torch.randn(3, 128)}
    t = torch.tensor([0, 300, 999])
    with torch.no_grad():
        assert torch.allclose(new(x, t, **cond).sample, old(x, t, **cond).sample, atol=1e-5)


def test_conditions_are_those_of_the_prompts():
    seen = []

    def encode(prompts):
        seen.extend(prompts)
        return {"number": torch.arange(len(seen) - len(prompts), len(seen))}

    conditions = teacher.Conditions(encode)
    attributes, stated = shapes.sample_attributes(200, generator()), shapes.sample_stated(200, generator(1))
    stated[0] = False
    rows = conditions(attributes, stated)["number"]
    assert [seen[r] for r in rows] == [shapes.prompt(a, s) if s.any() else "" for a, s in zip(attributes, stated)]


def test_half_of_the_times_are_low():
    t = teacher.draw_times(4000, generator())
    levels = teacher.SCHEDULE.sigma(t) / teacher.SCHEDULE.alpha(t)
    assert 0.45 < (levels < 4).float().mean() - 0.5 * (levels[:2000] < 4).float().mean() <= 0.5
    assert t.min() >= 0 and t.max() <= 1 and levels[2000:].min() > 0.11


@pytest.mark.slow
def test_a_whole_build_in_seconds(tmp_path, monkeypatch, capsys):
    """Every part, hardly trained, with figures of next to no pictures; then the teacher again, from its state."""
    from distill.file.metadata import read_metadata
    from distill.tutorial import build, metrics

    monkeypatch.setattr(metrics, "GROUPS", 5)
    monkeypatch.setattr(metrics, "PER_GROUP", 2)
    monkeypatch.setattr(build, "TRIAL", 16)
    (tmp_path / "assets").mkdir()
    minutes = {name: 0.03 for name in build.PARTS} | {"student": 0.4}
    options = build.Build(work=tmp_path / "work", assets=tmp_path / "assets", minutes=minutes, pool=64, n=16)
    build.run(options)
    for name, rows in (("teacher", {"20 steps", "1 step", "the student's law"}), ("student", {"1 step"})):
        assert set(read_metadata(tmp_path / "assets" / f"{name}.safetensors").metrics) == rows
    build.run(build.replace(options, parts=("teacher",)))
    assert "teacher: goes on from teacher.last.pt" in capsys.readouterr().out
