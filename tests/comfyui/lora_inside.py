"""What ComfyUI makes of exported LoRAs: its interpreter runs this file for test_lora_inside.py.

`lora_inside.py FOLDER`: reads FOLDER/published.json and the student's files, writes FOLDER/results.json.
"""

import json
from pathlib import Path

from inside_setup import ARGUMENTS, imported  # first: the imports below need comfy

# isort: split
import comfy.lora
import comfy.model_detection
import comfy.sd
import comfy.utils
import torch

FOLDER = Path(ARGUMENTS[0])
native, sample = imported("nodes.native"), imported("nodes.sample")


def weight(shape: list[int]) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def patches(model, held: dict) -> tuple[dict, list[str]]:
    """(What the LoraLoader would add, by the model's keys; the LoRA's keys that it has no use for)."""
    found = comfy.lora.load_lora(held, comfy.lora.model_lora_keys_unet(model, {}), log_missing=False)
    used = {key for patch in found.values() for key in patch.loaded_keys}
    return found, sorted(held.keys() - used - {k for k in held if k.endswith(".alpha")})


def published(said: dict) -> dict:
    """The family that is detected from shapes alone, and where a LoRA of these names goes in it."""
    weights = {k: weight(shape) for k, shape in said["weights"].items()}
    config = comfy.model_detection.model_config_from_unet(weights, "")
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="meta")
    held = {
        k: torch.ones(()) if k.endswith(".alpha") else torch.empty(v, device="meta") for k, v in said["lora"].items()
    }
    found, unused = patches(model, held)
    keys = {key if isinstance(key, str) else key[0] for key in found}
    unknown = sorted(keys - model.state_dict().keys())
    family = type(config).__name__
    return {"family": family, "layers": said["layers"], "patched": len(found), "unused": unused, "unknown": unknown}


def picture(model, clip) -> torch.Tensor:
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a small red ring on a blue background"))
    return sample.OneStepSample.execute(model, cond, {"samples": torch.zeros(2, 8, 8, 8)}, 1).args[0]["samples"]


def student() -> dict:
    """The base with the LoRA through the stock loader's own function, beside the merged file."""
    base, merged = (native.load(FOLDER / f"{name}.safetensors", [])[:2] for name in ("base", "merged"))
    held = comfy.utils.load_torch_file(str(FOLDER / "lora.safetensors"))
    added = comfy.sd.load_lora_for_models(*base, held, 1.0, 1.0)
    plain, ours, expected = picture(*base), picture(*added), picture(*merged)
    error, moved = ((a - expected).norm() / expected.norm() for a in (ours, plain))
    return {"error": error.item(), "moved": moved.item(), "unused": patches(base[0].model, held)[1]}


said = json.loads((FOLDER / "published.json").read_text())
results = {"published": {name: published(one) for name, one in said.items()}, "student": student()}
(FOLDER / "results.json").write_text(json.dumps(results))
