"""Transformers exported for ComfyUI: it knows the family, nothing is missing or left over, and it computes the same."""

import functools
import json
import subprocess

import pytest
import tiny_transformers
import torch
from safetensors.torch import save_file
from server import PACK, environment

from distill.backbones import load
from distill.backbones.skeleton import skeleton
from distill.header import CheckpointError

PUBLISHED = {
    "sd3": ("SD3", {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}),
    "sd3.5": ("SD3", {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                      "qk_norm": "rms_norm", "dual_attention_layers": range(13)}),
    "flux": ("Flux", {"guidance_embeds": True}),
    "schnell": ("FluxSchnell", {}),
    "pixart": ("PixArtAlpha", {"caption_channels": 4096}),
    "sigma": ("PixArtSigma", {"caption_channels": 4096, "use_additional_conditions": False}),
}  # fmt: skip
"""ComfyUI's name of the family, and the published model's configuration beside diffusers' defaults."""


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One of each family; PixArt's net a single block of the published width, as ComfyUI knows no other."""
    made = {}
    for name in tiny_transformers.FAMILIES:
        made[name] = load(tiny_transformers.make(name, tmp_path_factory.mktemp(name)))
    for name in ("pixart", "sigma"):
        net, config = made[name].net, PUBLISHED[name][1] | {"num_layers": 1}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made[name].parts["transformer"] = tiny_transformers.random(type(net), **config)
        made[name].meta.latent["factor"] = 8
    return made


@pytest.fixture(scope="module")
def results(comfyui, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfy")
    shapes = {}
    for name, (_, config) in PUBLISHED.items():
        model = models[name.removesuffix(".5")]
        mine = model.net
        model.parts["transformer"] = skeleton(functools.partial(type(mine), **config))
        shapes[name] = {k: list(v.shape) for k, v in model.comfy_weights(model.net).items()}
        model.parts["transformer"] = mine
        if name in models:
            write(model, folder / name)
    (folder / "shapes.json").write_text(json.dumps(shapes))
    command = [comfyui[1], str(PACK / "tests/comfyui/transformers_inside.py"), str(folder)]
    done = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=600)
    assert (folder / "results.json").is_file(), (done.stdout + done.stderr)[-5000:]
    return json.loads((folder / "results.json").read_text())


@torch.no_grad()
def write(model, folder):
    """The exported net, and what it says of something."""
    folder.mkdir()
    model.save_comfy(folder / "net.safetensors", model.net, torch.float32)
    config = model.net.config
    width = config.get("joint_attention_dim") or config.caption_channels
    cond = {"encoder_hidden_states": rand(2, 7, width)}
    if "pooled_projection_dim" in config:
        cond["pooled_projections"] = rand(2, config.pooled_projection_dim)
    else:
        cond["encoder_attention_mask"] = torch.ones(2, 7)
    if config.get("guidance_embeds"):
        cond["guidance"] = torch.full((2,), 3.5)
    side = 64 if "encoder_attention_mask" in cond else 8  # PixArt's places are by parts of 512 pixels
    x, index = rand(2, model.meta.latent["channels"], side, side), torch.tensor([500.0, 900.0])
    out = model.call(model.net, x, index, cond)
    save_file({"x": x, "index": index, "out": out.contiguous(), **cond}, folder / "said.safetensors")


@pytest.mark.parametrize("name", PUBLISHED)
def test_comfyui_knows_the_published_size(results, name):
    assert results["published"][name] == {"family": PUBLISHED[name][0], "missing": [], "left over": []}


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n != "sd3.5"])
def test_its_own_loader_computes_the_same(results, name):
    found = results["loaded"][name]
    assert found.pop("error") < 1e-5
    assert found == {"family": PUBLISHED[name][0], "missing": [], "left over": []}


def test_what_comfyui_does_not_know_is_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match="ComfyUI does not know Sana. Export a diffusers folder"):
        models["sana"].save_comfy(tmp_path / "s.safetensors", models["sana"].net)
    narrow = load(tiny_transformers.make("pixart", tmp_path / "p"))
    with pytest.raises(CheckpointError, match="num_attention_heads is 2, but of ComfyUI's PixArt-alpha 16"):
        narrow.save_comfy(tmp_path / "p.safetensors", narrow.net)
    assert not list(tmp_path.glob("*.safetensors"))
