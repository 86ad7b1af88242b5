"""What ComfyUI makes of exported transformers: its interpreter runs this file for test_transformers_inside.py.

`transformers_inside.py FOLDER`: reads FOLDER/shapes.json and FOLDER/*/net.safetensors, writes FOLDER/results.json.
"""

import json
from pathlib import Path

from inside_setup import ARGUMENTS  # first: the imports below need comfy

# isort: split
import comfy.model_detection
import comfy.sd
import comfy.utils
import torch

FOLDER = Path(ARGUMENTS[0])


def compared(family: str, there: dict, expected: dict) -> dict:
    """What ComfyUI's network lacks, and has no place for."""
    return {
        "family": family,
        "missing": sorted(set(expected) - set(there)),
        "left over": sorted(set(there) - set(expected)),
    }


def published(shapes: dict) -> dict:
    """The family that is detected from shapes alone, and its network's names."""
    weights = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(weights, "")
    config.set_inference_dtype(torch.float32, None)
    net = config.get_model(weights, "", device="meta").diffusion_model
    return compared(type(config).__name__, config.process_unet_state_dict(weights), net.state_dict())


def loaded(folder: Path) -> dict:
    """As the stock Load Diffusion Model node loads it, and how far it is from what diffusers' network says."""
    path, said = folder / "net.safetensors", comfy.utils.load_torch_file(str(folder / "said.safetensors"))
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    family, net = patcher.model.model_config, patcher.model.diffusion_model
    more = {"y": said["pooled_projections"]} if "pooled_projections" in said else {}
    if "guidance" in said:
        more["guidance"] = said["guidance"]
    index = said["index"] / (1000 if type(family).__name__.startswith("Flux") else 1)
    out = net(said["x"], index, context=said["encoder_hidden_states"], **more)
    file = family.process_unet_state_dict(comfy.utils.load_torch_file(str(path)))
    found = compared(type(family).__name__, file, net.state_dict())
    return found | {"error": ((out - said["out"]).norm() / said["out"].norm()).item()}


if __name__ == "__main__":
    shapes = json.loads((FOLDER / "shapes.json").read_text())
    results = {
        "published": {name: published(found) for name, found in shapes.items()},
        "loaded": {file.parent.name: loaded(file.parent) for file in FOLDER.glob("*/net.safetensors")},
    }
    (FOLDER / "results.json").write_text(json.dumps(results))
