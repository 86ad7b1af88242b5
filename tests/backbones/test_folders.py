"""Diffusers folders as people have them: half precision alone, damaged, someone else's; and what cannot be one."""

import json
import shutil
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distill.backbones import load
from distill.header import CheckpointError
from distill.tutorial.bundled import bundled

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "sd")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.net.parameters(), b.net.parameters(), strict=True))


def test_half_precision_alone_is_opened_and_written_as_any_other(folder, original):
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    model = load(folder)
    assert same(model, load(original))
    path = model.save_folder(folder.parent / "student", model.net, torch.float32)
    assert not list(path.rglob("*fp16*")) and same(load(path), model)


def test_of_two_precisions_the_full_one_is_copied(folder):
    for file in list(folder.rglob("*.safetensors")):
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    model = load(folder)
    path = model.save_folder(folder.parent / "student", model.net)
    assert len(list(path.rglob("*.safetensors"))) == 3 and not list(path.rglob("*fp16*"))
    assert load_file(path / UNET)["conv_in.weight"].dtype == torch.float16


def test_a_student_takes_the_place_of_one_and_of_nothing_else(folder, tmp_path):
    model, path = load(folder), tmp_path / "out"
    for method in ("sds", "vsd"):
        model.save_folder(path, model.net, method=method)
    assert load(path).meta.method == "vsd" and not list(tmp_path.glob(".onestep-*"))
    with pytest.raises(CheckpointError, match="sd: a folder that OneStep did not write. Name another"):
        model.save_folder(folder, model.net)
    assert not (folder / "onestep.json").exists()


def test_damage_is_told(folder):
    file = folder / UNET
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "conv_norm_out.weight"}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="sd: its unet lacks 'conv_norm_out.weight'"):
        load(folder)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="sd: diffusers cannot open it: "):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"onestep.version": 1}', '{"onestep.version": "1"}'])
def test_damaged_metadata_is_told(folder, text):
    (folder / "onestep.json").write_text(text)
    with pytest.raises(CheckpointError, match="onestep.json"):
        load(folder)


@pytest.mark.parametrize(
    "key, value",
    [("beta_schedule", "squaredcos_cap_v2"), ("rescale_betas_zero_snr", True), ("prediction_type", "velo")],
)
def test_noise_levels_that_are_not_known_are_told(folder, key, value):
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=f"its scheduler's {key} {value!r} is not one of"):
        load(folder)


def test_latents_that_are_scaled_otherwise_are_told(folder):
    file = folder / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}))
    with pytest.raises(CheckpointError, match="its vae normalises each channel of latents"):
        load(folder)


def test_a_net_for_inpainting_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="its unet takes 9 channels, its vae makes 4: made for inpainting"):
        load(tiny.stable_diffusion(tmp_path / "sd", unet={"in_channels": 9}))


def test_the_tutorials_model_is_no_pipeline_and_no_stock_checkpoint(tmp_path):
    model = load(bundled("student"))
    with pytest.raises(CheckpointError, match="diffusers does not know its autoencoder"):
        model.save_folder(tmp_path / "folder", model.net)
    with pytest.raises(CheckpointError, match="ComfyUI's own loader takes"):
        model.save_comfy(tmp_path / "file.safetensors", model.net)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method, steps", [("vsd", 1), ("teacher", 2)])
@torch.no_grad()
def test_a_file_becomes_a_folder(tmp_path, method, steps):
    """Of diffusers' own classes, from a OneStep file."""
    from diffusers import DiffusionPipeline

    how = {"vae": "kl", "unet": {"class_embed_type": None, "projection_class_embeddings_input_dim": None}}
    how |= {"method": method, "steps": steps, "guidance": {"scale": 2.0, "baked": method != "teacher"}}
    how |= {"prediction": "eps", "schedule": {"kind": "ddpm"}, "latent": tiny.LATENT | {"rgb_factors": None}}
    model = load(tiny.write(tmp_path / "s.safetensors", **how))
    again = load(model.save_folder(tmp_path / "folder", model.net, torch.float32))
    pictures = [m.sample(["a red ring"], torch.Generator().manual_seed(0)) for m in (model, again)]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    assert (again.meta.method, again.meta.steps, again.meta.t_in) == (method, steps, 999)
    kinds = {"vsd": "LCMScheduler", "teacher": "DPMSolverMultistepScheduler"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # such as of a scheduler's configuration
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(pipeline.scheduler).__name__ == kinds[method]
