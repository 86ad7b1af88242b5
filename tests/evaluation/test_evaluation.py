"""FID, KID, CLIP score and diversity: closed forms, and the door of `distill eval` with tiny random nets."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from distill.cli import main
from distill.evaluation.extractors import Inception
from distill.evaluation.figures import Gaussian, clip_score, diversity, frechet, gaussian, kid


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------- closed forms


def test_frechet_of_two_gaussians_is_the_formula_and_of_features_its_estimate():
    a = torch.randn(3, 3, generator=generator(1), dtype=torch.float64)
    b = torch.randn(3, 3, generator=generator(2), dtype=torch.float64)
    one = Gaussian(torch.zeros(3).double(), a @ a.T)
    other = Gaussian(torch.tensor([1.0, 2, 2]).double(), b @ b.T)
    product = np.linalg.eigvals((one.cov @ other.cov).numpy())
    expected = 9 + one.cov.trace() + other.cov.trace() - 2 * np.sqrt(product.clip(0)).real.sum()
    assert frechet(one, other) == pytest.approx(expected.item(), rel=1e-9)
    scaled = Gaussian(one.mean, 4 * one.cov)  # trace(C) (1 - 2)^2
    assert frechet(one, scaled) == pytest.approx(one.cov.trace().item(), rel=1e-9)
    x = torch.randn(40_000, 3, generator=generator(3)).double() @ a.T
    y = torch.randn(40_000, 3, generator=generator(4)).double() @ b.T + other.mean
    assert frechet(x, y) == pytest.approx(expected.item(), rel=0.02)
    assert frechet(gaussian(x), y) == pytest.approx(frechet(x, y), rel=1e-9)


def test_kid_is_unbiased_and_has_its_closed_form():
    """In one dimension with means m and 0: E k(x, y) over independent pairs, from the moments of Gaussians."""
    a, b = torch.randn(3000, 1, generator=generator(5)), torch.randn(3000, 1, generator=generator(6)) + 1
    same = kid(a, torch.randn(3000, 1, generator=generator(7)), generator(), subsets=50)[0]
    first, second, third = 1.0, 2.0, 4.0  # raw moments of N(1, 1); of N(0, 1): 0, 1, 0
    aa, ab = 1 + 3 * 1, 1 + 3 * 0 + 3 * second  # E (xy + 1)^3 = 1 + 3 m1 m1' + 3 m2 m2' + m3 m3'
    bb = 1 + 3 * first**2 + 3 * second**2 + third**2
    found, spread = kid(a, b, generator(), subsets=200)
    assert found == pytest.approx(aa + bb - 2 * ab, rel=0.1) and 0 < spread < found
    assert abs(same) < 0.1
    assert kid(a, b, generator(), subsets=9) == kid(a, b, generator(), subsets=9)


def test_clip_score_and_diversity_are_cosines():
    e = torch.eye(3)
    assert clip_score(e[[0, 1, 2]], torch.stack([e[0], e[0] + e[1], -e[2]])) == pytest.approx(
        (100 + 100 / math.sqrt(2) + 0) / 3
    )
    same, different = e[[0, 0, 0]], e[[0, 1, 2]]
    assert diversity(torch.cat([same, different]), groups=2) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------ the door


class Layers(nn.Module):
    """Stands for Inception: the mean colours of the quarters of a picture, through a random matrix."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 8)
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn(8, 12, generator=generator()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 299 and x.abs().max() <= 1
        return self.mix(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Script(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers((x - 128) / 128)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """A tiny model, an extractor and a CLIP with random weights, prompts, real pictures; their folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    place = tmp_path_factory.mktemp("nets")
    tiny.write(place / "m.safetensors")
    torch.jit.script(Script()).save(str(place / "inception.pt"))
    words = tiny.clip_tokenizer()
    text = {"vocab_size": len(words), "max_position_embeddings": 32, "hidden_size": 16, "intermediate_size": 16}
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16}
    shared = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**text, **shared, eos_token_id=len(words) - 1).to_dict(),
        vision_config=CLIPVisionConfig(**vision, **shared).to_dict(),
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(place / "clip")
    words.save_pretrained(place / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(place / "clip")
    (place / "prompts.txt").write_text("a red ring\na blue square\na green circle\n")
    (place / "real").mkdir()
    dice = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(dice.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(place / "real" / f"{i}.png")
    return place


def distill(*words):
    return main([str(w) for w in words])


def measure(nets, out, *more):
    words = ["eval", "--model", nets / "m.safetensors", "--prompts", nets / "prompts.txt", "--n", 16, "--device", "cpu"]
    words += ["--inception", nets / "inception.pt", "--clip", nets / "clip", "--out", out, *more]
    assert distill(*words) == 0
    return json.loads(Path(out).read_text())


def test_every_figure_comes_with_its_protocol_and_comes_again(nets, tmp_path, capsys):
    found = measure(nets, tmp_path / "a.json", "--reference", nets / "real")
    told = capsys.readouterr().out
    figures, protocol = found["figures"], found["protocol"]
    assert set(figures) == {"n", "fid", "kid", "kid_std", "clip_score", "diversity", "seconds_per_picture"}
    assert all(name in told for name in figures) and figures["fid"] > 0 and 0 < figures["diversity"] < 2
    assert 0 <= figures["clip_score"] <= 100 and figures["seconds_per_picture"] > 0
    assert "bicubic" in protocol["inception"]["resize"] and protocol["noise"]["seed"] == 1234
    assert protocol["sampler"] == {"steps": 1, "solver": "its own", "guidance": 2.0, "baked": True}
    assert protocol["reference"]["n"] == 12 and len(protocol["reference"]["sha256"]) == 64
    assert protocol["prompts"]["count"] == 3 and protocol["size"] == 64
    inception = Inception(nets / "inception.pt", torch.device("cpu"))
    real = inception([Image.open(p) for p in sorted((nets / "real").iterdir())])
    stats = gaussian(real)
    np.savez(tmp_path / "real.npz", mu=stats.mean.numpy(), sigma=stats.cov.numpy())
    other = measure(nets, tmp_path / "b.json", "--reference", tmp_path / "real.npz", "--batch-size", 5)
    again = other["figures"]
    assert again["fid"] == pytest.approx(figures["fid"], rel=1e-3) and "kid" not in again
    assert protocol["kid"] and other["protocol"]["kid"] is None and "CLIP" in other["protocol"]["diversity"]
    assert again["clip_score"] == pytest.approx(figures["clip_score"], rel=1e-3)
    assert again["diversity"] == pytest.approx(figures["diversity"], rel=1e-2)


def test_the_protocol_names_no_figure_that_was_not_measured(nets, tmp_path):
    words = ["eval", "--model", nets / "m.safetensors", "--prompts", nets / "prompts.txt", "--n", 16, "--device", "cpu"]
    assert distill(*words, "--out", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["figures"]) == {"n", "seconds_per_picture"}
    assert [found["protocol"][name] for name in ("inception", "reference", "kid", "clip", "diversity")] == [None] * 5


def test_resizing_is_pils_with_antialiasing(nets):
    """A checkerboard of single pixels, seen at a third of its size, is grey and not black or white."""
    board = np.indices((897, 897)).sum(0) % 2 * 255
    picture = Image.fromarray(np.stack([board] * 3, -1).astype(np.uint8))
    seen = []
    inception = Inception(nets / "inception.pt", torch.device("cpu"))
    inception.net = lambda x: seen.append(x) or x.flatten(1)
    inception([picture])
    assert (seen[0] * 128 + 128 - 127.5).abs().max() < 20


@pytest.mark.parametrize(
    "words, says",
    [
        (["--reference", "real"], "give both for FID and KID, or neither"),
        (["--reference", "real", "--inception", "none.pt"], "none.pt: no such file: put inception-2015-12-05.pt"),
        (["--reference", "real", "--inception", "m.safetensors"], "m.safetensors: not that net"),
        (["--reference", "clip", "--inception", "inception.pt"], "clip: 0 pictures in it: two or more"),
        (["--clip", "real"], "real: no CLIP"),
        (["--clip", "nowhere"], "nowhere: no CLIP (no such folder): put a folder of transformers' CLIPModel there"),
    ],
)
def test_what_is_missing_is_told_with_where_to_put_it(nets, capsys, monkeypatch, words, says):
    monkeypatch.chdir(nets)
    prompts = ["eval", "--model", "m.safetensors", "--prompts", "prompts.txt", "--device", "cpu"]
    assert distill(*prompts, *words) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
    assert distill("eval", "--model", "m.safetensors", "--clip", "clip") == 2


def test_the_librarys_evaluate_is_the_tutorials_whatever_was_imported_before():
    import distill

    assert distill.Judge and callable(distill.evaluate)
