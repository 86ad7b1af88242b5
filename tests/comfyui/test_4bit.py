"""Running quantized models in a real ComfyUI, through its API, against the library on the same files."""

import pytest
import tiny
import torch
from graphs import FOUR_BITS, SEED, ksampler, load_4bit, one_step, quantize, scheduled
from safetensors.torch import load_file, save_file
from server import node
from test_nodes import close, kohya_lora, latent_of, library

from distill import sample
from distill.header import read_header
from distill.packed import weight
from distill.quantize.source import relative


@pytest.fixture(scope="module")
def modules(quantized):
    """The library's modules on the quantized file, computing in full precision."""
    mods = tiny.build(quantized[0])
    for part in (mods.unet, mods.text_encoder):
        for module in part.modules():
            if hasattr(module, "activations"):
                module.activations = "float"
    return mods


def test_the_new_file_is_close_to_the_old_one(client, quantized):
    assert (
        1e-3
        < relative(latent_of(client, one_step(FOUR_BITS)), latent_of(client, one_step("student.safetensors")))
        < 0.3
    )


@torch.no_grad()
def test_same_noise_same_latent_as_the_library(client, quantized, modules):
    """The text encoder of OneStepLoadStudent may round activations; here the library does as it does."""
    d, cond, _, noise, t_in = library(quantized[0], modules)
    expected = sample.one_step(d, t_in)(noise, cond)
    assert relative(latent_of(client, one_step(FOUR_BITS)), expected) < 0.03
    graph = one_step(FOUR_BITS, model=("four", 0)) | load_4bit(FOUR_BITS)
    assert relative(latent_of(client, graph), expected) < 0.03


def test_every_sampler_takes_it(client, quantized):
    expected = latent_of(client, one_step(FOUR_BITS, model=("four", 0)) | load_4bit(FOUR_BITS))
    stock = ksampler(FOUR_BITS, 1, 1.0) | load_4bit(FOUR_BITS)
    stock["sample"]["inputs"]["model"] = ["four", 0]
    close(latent_of(client, stock), expected, 1e-5)
    guider = node("BasicGuider", model=["four", 0], conditioning=["positive", 0])
    advanced = scheduled(FOUR_BITS, guider) | load_4bit(FOUR_BITS)
    advanced["schedule"]["inputs"]["model"] = ["four", 0]
    close(latent_of(client, advanced), expected, 1e-5)


def test_the_text_encoder_and_the_vae_of_a_whole_file_come_too(client, quantized):
    graph = (
        one_step(FOUR_BITS)
        | load_4bit(FOUR_BITS)
        | {"decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2])}
    )
    graph["image"] = node("PreviewImage", images=["decode", 0])
    expected = client.run(graph)
    graph["positive"]["inputs"]["clip"], graph["decode"]["inputs"]["vae"] = ["four", 1], ["four", 2]
    graph["sample"]["inputs"]["model"] = ["four", 0]
    found = client.run(graph)
    assert not found.errors, found.errors
    a, b = (client.latent(run.outputs["save"]["latents"][0]) for run in (found, expected))
    assert relative(a, b) < 0.03
    assert client.image(found.outputs["image"]["images"][0]).size == (64, 64)


def stock_lora(graph: dict, model=("four", 0), strength: float = 1.0) -> dict:
    inputs = {"model": list(model), "clip": ["load", 1], "lora_name": "four.safetensors"}
    graph["lora"] = node("LoraLoader", **inputs, strength_model=strength, strength_clip=strength)
    graph["positive"]["inputs"]["clip"] = ["lora", 1]
    graph["sample"]["inputs"]["model"] = ["lora", 0]
    return graph


@torch.no_grad()
def test_stock_lora_loader_is_exact(client, server, quantized):
    """Against the dequantized weights with the LoRA merged into them, in diffusers."""
    path = quantized[0]
    tensors = load_file(path)
    dense = {k: t for k, t in tensors.items() if k.rpartition(".")[0] not in weight.layers(tensors)}
    dense |= {k: t for k, t in tensors.items() if k.endswith(".bias")}
    for layer in weight.layers(tensors):
        dense[f"{layer}.weight"] = weight.QuantizedWeight.from_tensors(tensors, layer).dequantize().contiguous()
    merged = path.with_name("dequantized.safetensors")
    save_file(dense, merged, read_header(path)["__metadata__"])
    mods, layers = kohya_lora(tiny.build(merged), server.base / "models/loras/four.safetensors")
    assert layers > 60
    d, cond, _, noise, t_in = library(path, mods)
    expected = sample.one_step(d, t_in)(noise, cond)
    plain = latent_of(client, one_step(FOUR_BITS, model=("four", 0)) | load_4bit(FOUR_BITS))
    found = latent_of(client, stock_lora(one_step("dequantized.safetensors") | load_4bit(FOUR_BITS)))
    assert relative(found, expected) < 1e-3 and relative(found, plain) > 0.01
    both = latent_of(client, stock_lora(one_step(FOUR_BITS) | load_4bit(FOUR_BITS)))  # the text encoder in 4 bits, too
    assert relative(both, expected) < 0.03
    assert "lora key not loaded" not in server.log
    again = latent_of(client, one_step(FOUR_BITS, model=("four", 0), seed=SEED) | load_4bit(FOUR_BITS))
    assert torch.equal(again, plain)


@pytest.mark.slow
def test_a_real_clip_in_4_bits(client, server, folder):
    """CLIP-L at its real size, random weights: the widths ComfyUI knows are fixed."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        module = CLIPTextModel(config)
    target = server.base / "models/text_encoders"
    target.mkdir(exist_ok=True)
    sd = {"text_model." + k.removeprefix("text_model."): t.contiguous() for k, t in module.state_dict().items()}
    save_file(sd, target / "clip.safetensors")
    run = client.run(quantize("clip.safetensors", method="rtn"))
    assert not run.errors and (target / "clip-4bit.safetensors").is_file(), run.errors
    seen = quantize("clip.safetensors", name="clip-seen", prompts="", clip=["clip", 0])
    seen["clip"] = node("CLIPLoader", type="stable_diffusion", clip_name="clip.safetensors")
    run = client.run(seen)
    assert not run.errors and "on 4 general prompts, in ComfyUI" in run.outputs["quantize"]["text"][0], run.errors
    wide = {"cross_attention_dim": 768, "class_embed_type": None}
    tiny.write(folder / "wide.safetensors", unet=wide, text={"hidden_size": 768})
    results = []
    for loader, inputs in (
        ("CLIPLoader", {"clip_name": "clip.safetensors"}),
        ("OneStepLoad4BitCLIP", {"file": "clip-4bit.safetensors", "second": "none"}),
    ):
        graph = one_step("wide.safetensors") | {"clip": node(loader, type="stable_diffusion", **inputs)}
        graph["positive"]["inputs"]["clip"] = ["clip", 0]
        results.append(latent_of(client, graph))
    assert 1e-4 < relative(results[1], results[0]) < 0.2
