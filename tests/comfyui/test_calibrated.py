"""OneStepQuantize on files that do not say how they are run: with the MODEL and CLIP of stock loaders, it runs them."""

import pytest
import tiny
import torch
from graphs import load_4bit, quantize
from safetensors.torch import load_file, save_file
from server import node
from test_nodes import latent_of

from distill.layouts import unet_to_ldm
from distill.quantize.source import relative

CONFIG = {
    "block_out_channels": (320,), "layers_per_block": 1, "cross_attention_dim": 768, "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip


@pytest.fixture(scope="module")
def foreign(server, folder):
    """A U-Net that ComfyUI takes for Stable Diffusion 1.5's, in three files, and a student whose CLIP fits it."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [UNet2DConditionModel(**CONFIG) for _ in range(2)]
    for name, p in nets[0].named_parameters():
        if "norm" in name and name.endswith(".weight"):
            p.data[::16] *= 8  # a few channels are large, as in trained nets
    target = server.base / "models/diffusion_models"
    for name, net in zip(("shaped", "other"), nets):
        save_file(unet_to_ldm(net.state_dict(), net.config), target / f"{name}.safetensors")
    save_file(nets[0].state_dict(), target / "shaped-diffusers.safetensors")
    tiny.write(
        folder / "speaker.safetensors",
        unet={"cross_attention_dim": 768, "class_embed_type": None},
        text={"hidden_size": 768},
    )
    return target


def graph(file: str, model: str = "shaped.safetensors", **more) -> dict:
    connected = {"model": ["dense", 0], "clip": ["words", 1], "latent": ["empty", 0], "steps": 2}
    return {
        "dense": node("UNETLoader", unet_name=model, weight_dtype="default"),
        "words": node("OneStepLoadStudent", file="speaker.safetensors"),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    } | quantize(file, prompts="a red ring\na blue heart", **connected | more)


def picture(client, loader: dict) -> torch.Tensor:
    how = {"seed": 3, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    made = graph("") | loader
    del made["quantize"]
    for name, text in (("positive", "a small green star"), ("negative", "")):
        made[name] = node("CLIPTextEncode", clip=["words", 1], text=text)
    inputs = {"model": ["four", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    made["sample"] = node("KSampler", latent_image=["empty", 0], **inputs | how)
    made["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test")
    return latent_of(client, made)


def test_a_connected_model_is_run_and_rounded_better(client, server, foreign):
    before, file = len(server.log), "shaped.safetensors"
    run = client.run(graph(file, name="seen", method="awq"))
    assert not run.errors, run.errors
    said = run.outputs["quantize"]["text"][0]
    assert "calibrated on 2 prompts at 2 steps, in ComfyUI" in said and "method awq" in said
    assert "never ran" not in server.log[before:]
    assert not client.run(quantize(file, name="blind", method="rtn")).errors
    exact = picture(client, load_4bit(file))
    errors = [relative(picture(client, load_4bit(f"{how}.safetensors")), exact) for how in ("seen", "blind")]
    assert 0 < errors[0] < errors[1] < 0.5, errors


def test_a_file_in_diffusers_names_is_known_by_them(client, server, foreign):
    before = len(server.log)
    run = client.run(graph("shaped-diffusers.safetensors", name="smooth", method="smoothquant", bits="8"))
    assert "in ComfyUI" in run.outputs["quantize"]["text"][0] and "never ran" not in server.log[before:]
    assert sum(k.endswith(".pre_quant_scale") for k in load_file(foreign / "smooth.safetensors")) > 10


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clip": None}, "connect both"),
        ({"model": None}, "connect both"),
        ({"file": "other.safetensors"}, "not what other.safetensors holds"),
    ],
)
def test_what_is_not_the_files_is_told(client, foreign, changes, problem):
    made = graph("shaped.safetensors", name="never-made")
    inputs = made["quantize"]["inputs"] | changes
    made["quantize"]["inputs"] = {k: v for k, v in inputs.items() if v is not None}
    run = client.run(made)
    assert problem in run.errors["quantize"] and not (foreign / "never-made.safetensors").exists()
