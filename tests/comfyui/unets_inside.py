"""Checks of exported U-Nets with ComfyUI's own loader code; its interpreter runs this file for test_unets_inside.py.

`unets_inside.py OUT FOLDER`: writes {name: "" or the traceback} of every function called check_* to OUT.
"""

import json
import traceback
from pathlib import Path

from inside_setup import ARGUMENTS  # first: the imports below need comfy

# isort: split
import comfy.ldm.modules.diffusionmodules.openaimodel as openai
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy import model_detection
from safetensors.torch import load_file

OUT, FOLDER = map(Path, ARGUMENTS)
UNET = "model.diffusion_model."
UNUSED = ("text_projection.weight", "logit_scale")
"""Of a text encoder: ComfyUI has a place for them, files of SD 1.x and 2.x from diffusers have nothing to put there."""


def of_true_size(name):
    """An exported file without its data, but for what the loader reads."""
    shapes = json.loads((FOLDER / "shapes.json").read_text())[name]
    weights = {k: torch.empty(shape, dtype=torch.float16, device="meta") for k, shape in shapes.items()}
    read = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if read in weights:
        weights[read] = torch.zeros(shapes[read])
    return weights


def same(ours, theirs):
    ours, theirs = ({k: list(v.shape) for k, v in w.items()} for w in (ours, theirs))
    apart = [(k, ours.get(k), theirs.get(k)) for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)]
    assert not apart, apart[:10]


def is_whole(name, kind, prediction):
    weights = of_true_size(name)
    config = model_detection.model_config_from_unet(weights, UNET)
    assert type(config).__name__ == kind, type(config)
    model = config.get_model(weights, UNET, device="meta")
    assert model.model_type.name == prediction, model.model_type
    same({k[len(UNET) :]: v for k, v in weights.items() if k.startswith(UNET)}, model.diffusion_model.state_dict())
    target = config.clip_target(weights)
    encoder = target.clip(device="meta", dtype=torch.float16, model_options={}).state_dict()
    found = config.process_clip_state_dict(dict(weights))
    same(*({k: v for k, v in w.items() if not k.endswith(UNUSED)} for w in (found, encoder)))


def check_sd15():
    is_whole("sd15", "SD15", "EPS")


def check_sd2():
    is_whole("sd2", "SD20", "EPS")


def check_sdxl():
    is_whole("sdxl", "SDXL", "EPS")


def check_sdxl_v():
    is_whole("sdxl_v", "SDXL", "V_PREDICTION")


def check_vae():
    prefix = "first_stage_model."
    weights = of_true_size("sdxl").items()
    held = {k[len(prefix) :]: torch.zeros(v.shape, dtype=v.dtype) for k, v in weights if k.startswith(prefix)}
    same(held, comfy.sd.VAE(sd=dict(held)).first_stage_model.state_dict())


def check_the_net_says_the_same():
    """A tiny SDXL: ComfyUI's U-Net with the file's weights, and diffusers' with its own."""
    weights, seen = load_file(FOLDER / "tiny.safetensors"), load_file(FOLDER / "seen.safetensors")
    config = model_detection.detect_unet_config(weights, UNET)
    how = {"num_heads": -1, "num_head_channels": 16, "device": "cpu", "operations": comfy.ops.manual_cast}
    net = openai.UNetModel(**config, **how)
    net.load_state_dict({k[len(UNET) :]: v for k, v in weights.items() if k.startswith(UNET)})
    out = net(seen["x"], seen["index"], context=seen["words"], y=seen["y"])
    torch.testing.assert_close(out, seen["out"], rtol=1e-3, atol=1e-4)


def check_openclip():
    """Back through ComfyUI's own table."""
    weights, prefix = load_file(FOLDER / "tiny.safetensors"), "conditioner.embedders.1.model."
    held = {"g." + k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    found = comfy.utils.clip_text_transformers_convert(held, "g.", "")
    expected = load_file(FOLDER / "text.safetensors")
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def main() -> None:
    results = {}
    for name, function in list(globals().items()):
        if name.startswith("check_"):
            try:
                function()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    OUT.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
