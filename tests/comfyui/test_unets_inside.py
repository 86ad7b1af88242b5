"""What `Backbone.save_comfy` writes of Stable Diffusion 1.5, 2.x and XL is what ComfyUI's CheckpointLoaderSimple finds
out by itself: of true size without data, and one tiny net with data."""

import json
import re
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from server import PACK, environment

from distill.backbones import load
from distill.backbones.sdxl import SDXL
from distill.backbones.skeleton import skeleton
from distill.backbones.stable_diffusion import StableDiffusion
from distill.file.metadata import Metadata
from distill.header import CheckpointError
from distill.schedule import ddpm

INSIDE = PACK / "tests/comfyui/unets_inside.py"
CHECKS = re.findall(r"^def (check_\w+)", INSIDE.read_text("utf-8"), re.M)
UNETS = {
    "sd15": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
META = Metadata({}, "eps", ddpm().spec, 999, {"channels": 4, "scale": 0.18215, "shift": 0.0, "factor": 8})


def of_true_size(name):
    """A model of the real sizes, without data."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4} | kinds
    text = CLIP_H | {"hidden_act": "gelu"} if name == "sd2" else CLIP
    parts = {
        "unet": skeleton(lambda: UNet2DConditionModel(**UNETS[name])),
        "vae": skeleton(lambda: AutoencoderKL(**vae)),
        "text_encoder": skeleton(lambda: CLIPTextModel(CLIPTextConfig(**text))),
    }
    if name == "sdxl":
        larger = CLIPTextConfig(**CLIP_G, hidden_act="gelu", projection_dim=1280)
        parts["text_encoder_2"] = skeleton(lambda: CLIPTextModelWithProjection(larger))
        return SDXL(parts, None, META, name)
    block = parts["unet"].up_blocks[-1].attentions[-1].transformer_blocks[0]
    block.norm1.bias = torch.nn.Parameter(torch.zeros(320), False)  # ComfyUI reads it
    return StableDiffusion(parts, None, META, name)


@torch.no_grad()
def write_tiny(folder, source):
    """A tiny SDXL with data: its file, what its net says, and its larger text encoder."""
    model = load(source)
    model.save_comfy(folder / "tiny.safetensors", model.net, torch.float32)
    draw = torch.Generator().manual_seed(0)
    x, index = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([999.0, 250.0])
    cond = model.encode(["a red ring", "a blue square"])
    size = model.net.add_time_proj(torch.tensor([64, 64, 0, 0, 64, 64])).flatten().expand(2, -1)
    seen = {"x": x, "index": index, "words": cond["encoder_hidden_states"]}
    seen |= {"y": torch.cat([cond["text_embeds"], size], 1), "out": model.call(model.net, x, index, cond)}
    save_file({k: v.contiguous() for k, v in seen.items()}, folder / "seen.safetensors")
    text = {k: v for k, v in model.parts["text_encoder_2"].state_dict().items() if "position_ids" not in k}
    save_file(text, folder / "text.safetensors")


@pytest.fixture(scope="module")
def results(comfyui, tmp_path_factory):
    import families

    folder, source = tmp_path_factory.mktemp("unets"), tmp_path_factory.mktemp("sdxl")
    models = {name: of_true_size(name) for name in UNETS}
    models["sdxl_v"] = of_true_size("sdxl")
    models["sdxl_v"].meta = replace(META, prediction="v")
    shapes = {name: {k: list(v.shape) for k, v in m.comfy_weights(m.net).items()} for name, m in models.items()}
    (folder / "shapes.json").write_text(json.dumps(shapes))
    families.sdxl(source)
    write_tiny(folder, source)
    command = [comfyui[1], str(INSIDE), str(folder / "results.json"), str(folder)]
    done = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=900)
    assert (folder / "results.json").is_file(), (done.stdout + done.stderr)[-5000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_inside(results, check):
    assert results[check] == "", results[check]


def test_what_the_loader_would_call_wrong_is_refused():
    second = of_true_size("sd2")
    second.meta = replace(META, prediction="v")
    with pytest.raises(CheckpointError, match="prediction is v; by .*norm1.bias ComfyUI's own loader takes it for eps"):
        second.comfy_weights(second.net)
    bias = second.net.up_blocks[-1].attentions[-1].transformer_blocks[0].norm1.bias
    bias[:160] = 0.3
    second.comfy_weights(second.net)
    model = of_true_size("sd15")
    for change, told in (
        ({"prediction": "v"}, "its prediction is v; ComfyUI's own loader takes eps"),
        ({"schedule": ddpm(shift=4.0).spec}, "its shift is 4.0; ComfyUI's own loader takes 1.0"),
    ):
        model.meta = replace(META, **change)
        with pytest.raises(CheckpointError, match=told):
            model.comfy_weights(model.net)
