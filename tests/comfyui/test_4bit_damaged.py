"""Quantized files that are wrong in one way each, through ComfyUI's API: refused in one line that names the file."""

import json
import struct
import time

import pytest
import torch
from graphs import load, load_4bit, one_step, quantize, save
from safetensors.torch import load_file, save_file
from server import node

from distill.header import read_header
from distill.packed import weight
from distill.quantize import rounding


def header(tensors: dict, metadata: dict | None = None, size: int = 0) -> bytes:
    text = json.dumps(({"__metadata__": metadata} if metadata else {}) | tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.fixture(scope="module")
def bad(server, quantized):
    """Files that are wrong in one way each, in three of ComfyUI's folders."""
    sound, tensors = quantized[0].read_bytes(), load_file(quantized[0])
    strings = read_header(quantized[0])["__metadata__"]
    layer = weight.layers(tensors)[0]

    def changed(**entries) -> bytes:
        return {f"{layer}.{k}": v for k, v in entries.items()}

    def marked(**spec) -> dict:
        text = json.dumps({"format": "awq_w4a16", "group_size": 32, **spec}).encode()
        return changed(comfy_quant=torch.tensor(list(text), dtype=torch.uint8))

    deep = torch.tensor(list(b"[" * 60000), dtype=torch.uint8)
    raw = {
        "cut": sound[: len(sound) // 2],
        "page": b"<!DOCTYPE html><title>404</title>" * 9,
        "zip": b"PK\x03\x04" + bytes(200),
        "pickle": b"\x80\x02}q\x00X\x05\x00\x00\x00helloq\x01." + bytes(100),
        "huge-header": struct.pack("<Q", 1 << 60) + b"{}",
        "empty": b"",
        "gguf-cut": b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 40),
        "huge-shape": header(
            {"x.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, size=4
        ),
    }
    variants = {
        "unknown-format": marked(format="secret_w1"),
        "huge-orig": marked(orig_shape=[1 << 40, 1 << 40]),
        "negative": marked(orig_shape=[-1, -1]),
        "deep": changed(comfy_quant=deep),
        "wrong-type": changed(weight_scale=tensors[f"{layer}.weight_scale"].to(torch.int32)),
        "wrong-shape": changed(weight_scale=tensors[f"{layer}.weight_scale"][:, :5].contiguous()),
        "no-scale": {f"{layer}.weight_scale": None},
    }
    for place in ("diffusion_models", "text_encoders"):
        folder = server.base / "models" / place
        folder.mkdir(exist_ok=True)
        for name, data in raw.items():
            (folder / f"bad-{name}.safetensors").write_bytes(data)
        for name, entries in variants.items():
            weights = {k: v for k, v in (tensors | entries).items() if v is not None}
            save_file(weights, folder / f"bad-{name}.safetensors", strings if name != "unknown-format" else None)
    (server.base / "models/diffusion_models/bad-gguf.gguf").write_bytes(raw["gguf-cut"])
    (server.base / "models/text_encoders/bad-gguf.gguf").write_bytes(raw["gguf-cut"])
    save_file({"a.weight": torch.zeros(8, 8)}, server.base / "models/diffusion_models/bad-stranger.safetensors")
    save_file({"a.weight": torch.zeros(8, 8)}, server.base / "models/text_encoders/bad-stranger.safetensors")
    return tensors


def loaders(file: str) -> list[dict]:
    clip = {"type": "stable_diffusion", "second": "none", "third": "none"}
    image = load("student.safetensors") | save()
    image["sample"] = node("OneStepSample", model=["four", 0], positive=["positive", 0], latent=["empty", 0], seed=1)
    text = one_step("student.safetensors")
    text["four"] = node("OneStepLoad4BitCLIP", file=file, activations="auto", **clip)
    text["positive"]["inputs"]["clip"] = ["four", 0]
    return [image | load_4bit(file), text]


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("absent.safetensors", "no such file"),
        ("bad-cut.safetensors", "truncated"),
        ("bad-page.safetensors", "web page"),
        ("bad-zip.safetensors", "may run code"),
        ("bad-pickle.safetensors", "may run code"),
        ("bad-huge-header.safetensors", "not a safetensors file"),
        ("bad-empty.safetensors", "not a safetensors file"),
        ("bad-gguf.gguf", ""),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(client, bad, file, problem):
    for graph in loaders(file):
        run = client.run(graph)
        message = run.errors["four"].splitlines()[0]
        assert not run.events and file in message and problem in message, message
        assert run.errors["four"].count("validation failed") == 1


def test_a_bad_file_is_not_quantized(client, bad):
    cut = client.run(quantize("bad-cut.safetensors"))
    assert "bad-cut.safetensors: truncated" in cut.errors["quantize"] and not cut.events


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("unknown-format", "'secret_w1'"),
        ("huge-orig", "orig_shape"),
        ("negative", "orig_shape"),
        ("deep", "not a JSON object"),
        ("wrong-type", "not a float"),
        ("wrong-shape", "weight_scale is"),
        ("no-scale", "missing"),
        ("huge-shape", ""),
        ("stranger", "ComfyUI"),
    ],
)
def test_a_damaged_layer_names_the_file_and_the_layer(client, bad, file, problem):
    for graph in loaders(f"bad-{file}.safetensors"):
        run = client.run(graph)
        message = run.errors["four"].splitlines()[0]
        assert f"bad-{file}.safetensors" in message and problem in message, message
    assert not client.run(one_step("student.safetensors", seed=int(time.time()))).errors  # the server is well


def test_loading_a_onestep_file_in_4_bits_needs_its_parts(client, folder, quantized):
    """A file whose layers were quantized for another width says so by its weight's name."""
    tensors = load_file(quantized[0])
    layer = next(m for m in weight.layers(tensors) if m.endswith("attn2.to_k"))
    n = weight.QuantizedWeight.from_tensors(tensors, layer).shape[0]
    tensors |= rounding.round_to_nearest(torch.randn(n, 64), 4, 32).to_tensors(layer)
    for suffix in ("pre_quant_scale", "low_rank_up", "low_rank_down"):
        tensors.pop(f"{layer}.{suffix}", None)
    save_file(tensors, folder / "narrow.safetensors", read_header(quantized[0])["__metadata__"])
    run = client.run(one_step("narrow.safetensors"))
    message = run.errors["load"].splitlines()[0]
    assert "narrow.safetensors: wrong architecture" in message and "attn2.to_k" in message
