"""What `distill.packed.formats` writes, loaded by stock ComfyUI; and what it reads, run by ComfyUI's own Flux."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from server import PACK, environment

from distill.packed.formats import read
from distill.packed.weight import QuantizedWeight, layers
from distill.quantize.export import write

H, TEXT, POOLED = 128, 128, 128
STOCK = {"int8_tensorwise": 0.02, "convrot_w4a4": 0.3, "nvfp4": 0.2}
OURS = ("gguf:Q4_0", "gguf:Q5_1", "gguf:Q8_0")


def helper(name: str):
    """A test file of ../packed/formats, for its packers."""
    spec = importlib.util.spec_from_file_location(name, PACK / f"tests/packed/formats/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flux() -> dict[str, torch.Tensor]:
    """A Flux of one block of each sort, as small as detection takes it."""
    shapes = {"img_in": (H, 64), "txt_in": (H, TEXT), "final_layer.linear": (64, H)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * H, H), "single_blocks.0.modulation.lin": (3 * H, H)}
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", POOLED)):
        shapes |= {f"{name}.in_layer": (H, width), f"{name}.out_layer": (H, H)}
    for side in ("img", "txt"):
        parts = {"mod.lin": (6 * H, H), "attn.qkv": (3 * H, H), "attn.proj": (H, H)}
        parts |= {"mlp.0": (4 * H, H), "mlp.2": (H, 4 * H)}
        shapes |= {f"double_blocks.0.{side}_{k}": v for k, v in parts.items()}
    shapes |= {"single_blocks.0.linear1": (7 * H, H), "single_blocks.0.linear2": (H, 5 * H)}
    g = torch.Generator().manual_seed(0)
    weights = {f"{k}.weight": torch.randn(s, generator=g) * s[1] ** -0.5 for k, s in shapes.items()}
    weights |= {f"{k}.bias": torch.randn(s[0], generator=g) * 0.1 for k, s in shapes.items()}
    for norm in ("double_blocks.0.img_attn.", "double_blocks.0.txt_attn.", "single_blocks.0."):
        weights |= {f"{norm}norm.{c}_norm.weight": torch.ones(128) for c in ("query", "key")}
    return weights


def dense(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    marked = set(layers(weights))
    kept = {k: v for k, v in weights.items() if k.rpartition(".")[0] not in marked or k.endswith(".bias")}
    return kept | {f"{n}.weight": QuantizedWeight.from_tensors(weights, n).dequantize().contiguous() for n in marked}


def nf4(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pack, book = helper("test_formats").nf4_tensors, torch.linspace(-1, 1, 16)
    out = {}
    for key, w in weights.items():
        if key.endswith("weight") and w.ndim == 2 and "blocks" in key:
            scale = w.view(-1, 64).abs().amax(1)
            codes = ((w.view(-1, 64) / scale[:, None] + 1) * 7.5).round()
            packed = pack(tuple(w.shape), codes, scale, book)
            out |= {key.removesuffix("weight") + k[2:]: v.clone() for k, v in packed.items() if k != "y.bias"}
        else:
            out[key] = w
    return out


def nunchaku(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made, names = helper("test_nunchaku"), importlib.import_module("distill.packed.formats.nunchaku_names")
    one, two = "transformer_blocks.0", "single_transformer_blocks.0"
    sizes = {"qkv_proj": (3 * H, H), "out_proj": (H, H), "mlp_fc1": (4 * H, H), "mlp_fc2": (H, 4 * H)}
    places = [f"{one}.{n}" for n in sizes] + [f"{one}.{n}_context" for n in ("qkv_proj", "out_proj")]
    places += [f"{one}.mlp_context_{n}" for n in ("fc1", "fc2")] + [f"{two}.{n}" for n in sizes]
    out = {f"{a}.{e}": weights[f"{b}.{e}"] for a, b in names.REST.items() for e in ("weight", "bias")}
    shared = torch.ones(H).bfloat16() * 1.5  # of a single block's qkv and MLP
    for seed, place in enumerate(places):
        part = place.rpartition(".")[2].replace("_context", "")
        smooth = shared if place in (f"{two}.qkv_proj", f"{two}.mlp_fc1") else None
        layer = made.Original(*sizes[part], seed, smooth)
        layer.scale, layer.bias = layer.scale * 0.1, layer.bias * 0.1
        out |= layer.tensors(place)
    for parts, place in ((6, f"{one}.norm1"), (6, f"{one}.norm1_context"), (3, f"{two}.norm")):
        layer = made.Modulation(parts, H, parts)
        layer.scale, layer.bias = layer.scale * 0.1, layer.bias * 0.1
        out |= layer.tensors(f"{place}.linear")
    norms = [f"{one}.norm_{a}{c}.weight" for a in ("", "added_") for c in "qk"] + [
        f"{two}.norm_{c}.weight" for c in "qk"
    ]
    return out | {n: torch.ones(128) for n in norms}


@pytest.fixture(scope="module")
def errors(comfyui, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("formats")
    original, pairs = flux(), []
    save_file(original, folder / "flux.safetensors")  # stock ComfyUI goes by the name
    for format in STOCK:
        file = folder / f"{format}.safetensors"
        write(file, original, {}, format)
        pairs += [[file, folder / "flux.safetensors", loader] for loader in ("stock", "ours")]
    for format in OURS:
        write(folder / format, original, {}, format)
    save_file(nf4(original), folder / "nf4")
    save_file({k: v.contiguous() for k, v in nunchaku(original).items()}, folder / "nunchaku")
    for name in (*OURS, "nf4", "nunchaku"):
        file = folder / f"{name}-dense.safetensors"
        save_file(dense(read(folder / name).weights), file)
        pairs.append([folder / name, file, "ours"])
    (folder / "pairs.json").write_text(json.dumps([[str(a), str(b), c] for a, b, c in pairs]))
    script = PACK / "tests/comfyui/formats_inside.py"
    command = [comfyui[1], str(script), str(folder)]
    done = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=600)
    assert (folder / "errors.json").is_file(), (done.stdout + done.stderr)[-5000:]
    assert load_file(file).keys() == original.keys()
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.parametrize("format", STOCK)
def test_stock_comfyui_loads_what_is_written_for_it(errors, format):
    found = errors[f"{format} stock"]
    assert isinstance(found, list), found
    assert found[1] == 13 and 0 < found[0] < STOCK[format]
    assert errors[f"{format} ours"] == found  # our loader leaves them to the same operations


@pytest.mark.parametrize("name", (*OURS, "nf4", "nunchaku"))
def test_what_is_read_is_exact(errors, name):
    found = errors[f"{name} ours"]
    assert isinstance(found, list), found
    assert found[1] == 13 and found[0] < 1e-5
