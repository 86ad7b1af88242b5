"""Exported LoRAs in ComfyUI's own loader: every key finds its layer, and the sum is that of the merged weights."""

import json
import subprocess

import pytest
import tiny
import torch
from server import PACK, environment

from distill.adapters import Folded, Lora, adaptable, of
from distill.backbones import comfy_names, load
from distill.backbones.adapted import adapted
from distill.backbones.skeleton import skeleton
from distill.file import lora
from distill.layouts import unet_to_ldm

PUBLISHED = {
    "SD15": {"cross_attention_dim": 768},
    "SD20": {
        "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    },
    "SDXL": {
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
"""ComfyUI's name of the family, and the published U-Net's configuration beside diffusers' defaults."""


def unet(config):
    """A published U-Net without memory, and its weights in ComfyUI's layout."""
    from diffusers import UNet2DConditionModel

    net = skeleton(lambda: UNet2DConditionModel(**config))
    return net, unet_to_ldm(net.state_dict(), net.config)


def transformers():
    """(ComfyUI's name of the family, a published transformer without memory, its weights in ComfyUI's layout)."""
    from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

    wide = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
    made = {
        "SD3": (lambda: SD3Transformer2DModel(**wide), comfy_names.sd3(24), {}),
        "Flux": (lambda: FluxTransformer2DModel(guidance_embeds=True), comfy_names.flux(), {}),
        "PixArtAlpha": (
            lambda: PixArtTransformer2DModel(caption_channels=4096), comfy_names.pixart(),
            {"y_embedder.y_embedding": torch.empty(120, 4096, device="meta")},
        ),
    }  # fmt: skip
    for family, (make, names, more) in made.items():
        net = skeleton(make)
        yield family, net, comfy_names.rename(net.state_dict(), names) | more


def published(net, weights, part):
    """Names and shapes in ComfyUI's layout, and those of a LoRA on all layers."""
    tensors = {}
    for name, layer in adaptable(net).items():
        out, *rest = layer.weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.empty(1, *rest, device="meta")
        tensors[f"{name}.lora_B.weight"] = torch.empty(out, 1, *[1] * len(rest[1:]), device="meta")
    named, _ = lora.comfy_names(lora.LoraFile(Folded(tensors, 1, 1.0), "base", part, {}))
    return {"layers": len(adaptable(net))} | {
        what: {k: list(v.shape) for k, v in held.items()} for what, held in (("weights", weights), ("lora", named))
    }


def write_student(folder):
    """base.safetensors, a LoRA of it as the command line exports it, and the two merged."""
    base = load(tiny.write(folder / "base.safetensors"))
    made = Lora(base.net, rank=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in made.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    held = lora.of_student(of(made.module), base.name, base.main, base.meta)
    lora.write(folder / "lora.safetensors", held, lora.comfy_names)
    student = adapted(base, held, folder / "merged.safetensors")
    student.save(folder / "merged.safetensors", student.net, torch.float32)


@pytest.fixture(scope="module")
def results(comfyui, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    found = {name: published(*unet(config), "unet") for name, config in PUBLISHED.items()}
    found |= {name: published(net, weights, "transformer") for name, net, weights in transformers()}
    (folder / "published.json").write_text(json.dumps(found))
    write_student(folder)
    command = [comfyui[1], str(PACK / "tests/comfyui/lora_inside.py"), str(folder)]
    done = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=900)
    assert (folder / "results.json").is_file(), (done.stdout + done.stderr)[-5000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("family", [*PUBLISHED, "SD3", "Flux", "PixArtAlpha"])
def test_every_key_finds_its_layer(results, family):
    found = results["published"][family]
    assert found["family"] == family and found["unused"] == [] and found["unknown"] == []
    assert found["layers"] == found["patched"] > 100


def test_the_sum_is_that_of_the_merged_weights(results):
    found = results["student"]
    assert found["unused"] == [] and found["moved"] > 0.05 and found["error"] < 1e-4
