"""Foreign files in ComfyUI's own objects: ComfyUI's interpreter runs this file for test_formats_inside.py.

`formats_inside.py FOLDER`: reads FOLDER/pairs.json, a list of [file, dense file, "stock" or "ours"], loads both, runs
both on the same input and writes FOLDER/errors.json: file -> [relative error, quantized layers] or a traceback.
"""

import json
import traceback
from pathlib import Path

from inside_setup import ARGUMENTS, imported  # first: the imports below need comfy

# isort: split
import comfy.model_management as mm
import comfy.sd
import torch
from comfy.quant_ops import QuantizedTensor

FOLDER = Path(ARGUMENTS[0])
four_bit = imported("nodes.four_bit")


def velocity(patcher):
    """What a Flux says to a fixed input."""
    mm.load_models_gpu([patcher])
    model, g = patcher.model, torch.Generator().manual_seed(1)
    config = model.model_config.unet_config
    x = torch.randn(1, 16, 16, 16, generator=g)
    text = torch.randn(1, 8, config["context_in_dim"], generator=g)
    y = torch.randn(1, config["vec_in_dim"], generator=g)
    return x - model.apply_model(x, torch.tensor([0.7]), c_crossattn=text, y=y, guidance=torch.tensor([3.5])).float()


def compare(file, dense, loader):
    patcher = (
        comfy.sd.load_diffusion_model(file) if loader == "stock" else four_bit.load_file(Path(file), [], "float")[0]
    )
    modules = [*patcher.model.diffusion_model.modules()]
    layers = sum(
        isinstance(getattr(m, "weight", None), QuantizedTensor) or getattr(m, "is_quantized", False) for m in modules
    )
    expected = velocity(comfy.sd.load_diffusion_model(dense))
    return [((velocity(patcher) - expected).norm() / expected.norm()).item(), layers]


errors = {}
for file, dense, loader in json.loads((FOLDER / "pairs.json").read_text()):
    try:
        errors[f"{Path(file).name.removesuffix('.safetensors')} {loader}"] = compare(file, dense, loader)
    except Exception:
        errors[f"{Path(file).name.removesuffix('.safetensors')} {loader}"] = traceback.format_exc()
    mm.unload_all_models()
(FOLDER / "errors.json").write_text(json.dumps(errors))
