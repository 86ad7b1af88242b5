"""What the checks of inside.py share: the tiny student in 4 bits and dense, images from it, LoRAs for it."""

from pathlib import Path

import comfy.lora
import comfy.sd
import torch
from inside_setup import ARGUMENTS, imported
from safetensors.torch import load_file, save_file

FOLDER = Path(ARGUMENTS[1])
native, detect, packed = (imported(f"nodes.native{n}") for n in ("", ".detect", ".packed"))
four_bit, sample = imported("nodes.four_bit"), imported("nodes.sample")
rounding, weight = imported("distill.quantize.rounding"), imported("distill.packed.weight")
STATIC = imported("nodes.native.patcher").STATIC  # a keyword that ComfyUI 0.12 has not
read_header, lowrank = imported("distill.header").read_header, imported("distill.quantize.lowrank")
CPU = torch.device("cpu")
TOLERANCE = 1e-5  # both sides compute in fp32


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def quantized(sd: dict, dense=(), rank=0) -> tuple[dict, dict]:
    """A dense state dict -> (quantized, and what that stands for in fp32)."""
    out, same = {}, {}
    for key, w in sd.items():
        layer, end = key.removesuffix(".weight"), key.endswith(".weight")
        group = weight.group_for(w.shape[1], 32) if end and w.ndim in (2, 4) and w.shape[1] >= 16 else None
        if group is None or any(d in key for d in ("embed", *dense)):
            out[key] = same[key] = w.float()
            continue
        q = rounding.round_to_nearest(w.float(), 4, group)
        if rank:
            q = lowrank.svd(w.float(), 4, group, rank)
        out |= q.to_tensors(layer)
        same[key] = q.dequantize().contiguous()
    return out, same


def pair(tmp=FOLDER, rank=0):
    """The tiny student in 4 bits, and the same numbers dense: ((MODEL, CLIP), (MODEL, CLIP))."""
    source = FOLDER / "student.safetensors"
    sd, strings = load_file(source), read_header(source)["__metadata__"]
    parts = [{k: v for k, v in sd.items() if k.startswith("first_stage") is vae} for vae in (True, False)]
    q, d = quantized(parts[1], rank=rank)
    save_file(q | parts[0], tmp / "inside-4.safetensors", strings)
    save_file(d | parts[0], tmp / "inside-dense.safetensors", strings)
    loads = (tmp / "inside-4.safetensors", {"activations": "float"}), (tmp / "inside-dense.safetensors", {})
    return tuple(native.load(path, [], disable_dynamic=True, **more)[:2] for path, more in loads)


def image(model, clip, steps=1, seed=1):
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a small red ring on a blue background"))
    latent = {"samples": torch.zeros(2, 8, 8, 8)}
    if steps == 1:
        return sample.OneStepSample.execute(model, cond, latent, seed).args[0]["samples"]
    import nodes

    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    return nodes.common_ksampler(model, seed, steps, 2.0, "euler", "simple", cond, empty, latent)[0]["samples"]


def call(patcher, memory=0):
    """The U-Net once, loaded with so much memory (0: all there is)."""
    patcher.patch_model(CPU, lowvram_model_memory=memory)
    return run(patcher)


def run(patcher):
    x, context, y = rand(2, 8, 8, 8), rand(2, 32, 128, seed=1), rand(2, 128, seed=2)
    return patcher.model.apply_model(x, torch.tensor([999.0, 500.0]), c_crossattn=context, y=y)


def lora(model, clip, kind: str, size=0.05, seed=0) -> dict:
    """A LoRA file with kohya's names on every layer the kind can go on; names and shapes are those of a dense model."""
    g = torch.Generator().manual_seed(seed)
    weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    names = comfy.lora.model_lora_keys_unet(model.model, {}) | comfy.lora.model_lora_keys_clip(
        clip.cond_stage_model, {}
    )
    file, seen = {}, set()

    def r(*shape):
        return size * torch.randn(*shape, generator=g)

    for name, key in names.items():
        w = weights.get(key) if isinstance(key, str) else None
        if w is None or key in seen or w.ndim not in (2, 4) or not name.startswith("lora_"):
            continue
        seen.add(key)
        (o, i), k = w.shape[:2], tuple(w.shape[2:])
        one = (1,) * len(k)
        if kind in ("lora", "dora"):
            file |= {f"{name}.lora_up.weight": r(o, 4, *one), f"{name}.lora_down.weight": r(4, i, *k)}
            file[f"{name}.alpha"] = torch.tensor(3.0)
        if kind == "dora":
            file[f"{name}.dora_scale"] = 1.1 * w.flatten(1).norm(dim=1).view(o, 1, *one)
        if kind == "locon" and k == (3, 3):
            file |= {f"{name}.lora_up.weight": r(o, 4, 1, 1), f"{name}.lora_down.weight": r(4, i, 1, 1)}
            file[f"{name}.lora_mid.weight"] = 6 * r(4, 4, 3, 3)
        if kind == "loha" and not k:
            file |= {f"{name}.hada_w{n}_{ab}": 4 * r(*s) for n in (1, 2) for ab, s in (("a", (o, 3)), ("b", (3, i)))}
        if kind == "lokr" and not k and o % 4 == i % 4 == 0:
            file |= {f"{name}.lokr_w1": r(4, 4), f"{name}.lokr_w2": r(o // 4, i // 4)}
        if kind == "diff":
            file[f"{name}.diff"] = 0.1 * r(*w.shape)
            if key[:-6] + "bias" in weights:
                file[f"{name}.diff_b"] = r(o)
    assert file
    return file


def with_lora(pair, *loras_and_strengths):
    for file, strength in loras_and_strengths:
        pair = comfy.sd.load_lora_for_models(*pair, file, strength, strength)
    return pair
