"""Quantizing and running quantized models in a real ComfyUI, through its API, against the library on the same files."""

import json
import struct
import time

import pytest
import tiny
import torch
from graphs import SEED, ksampler, load, one_step, save, scheduled
from safetensors.torch import load_file, save_file
from server import node
from test_nodes import close, kohya_lora, latent_of, library

from distill import sample
from distill.header import read_header
from distill.packed import weight
from distill.quantize import rounding

OUT = "four-bits.safetensors"


def quantize(file: str, **more) -> dict:
    inputs = {"file": file, "name": "", "method": "auto", "bits": "4", "text_encoder": True, "prompts": "a red ring"}
    return {"quantize": node("OneStepQuantize", **inputs | more)}


def load_4bit(file, activations: str = "float") -> dict:
    return {"four": node("OneStepLoad4Bit", file=file, activations=activations)}


@pytest.fixture(scope="module")
def quantized(client, folder):
    """The tiny student through OneStepQuantize -> (path, what the node said, the run)."""
    run = client.run(quantize("student.safetensors", name=OUT.removesuffix(".safetensors")))
    assert not run.errors, run.errors
    return folder / OUT, run.outputs["quantize"]["text"][0], run


@pytest.fixture(scope="module")
def modules(quantized):
    """The library's modules on the quantized file, computing in full precision."""
    mods = tiny.build(quantized[0])
    for part in (mods.unet, mods.text_encoder):
        for module in part.modules():
            if hasattr(module, "activations"):
                module.activations = "float"
    return mods


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------ quantizing


def test_the_node_makes_a_smaller_file_and_says_how(quantized, folder):
    path, text, run = quantized
    dense = load_file(folder / "student.safetensors")
    marked = weight.layers(load_file(path))
    assert len([m for m in marked if m.startswith("model.diffusion_model.")]) > 60
    assert any(m.startswith("cond_stage_model.") for m in marked)
    assert path.stat().st_size < 0.5 * sum(2 * t.numel() for t in dense.values())
    assert "calibrated on 1 prompts" in text and "bits per weight" in text
    steps = [e for e in run.events if e == ("progress", "quantize")]
    assert len(steps) > 3
    seconds = float(text.splitlines()[-1].removesuffix(" s"))
    assert 0.5 * run.seconds < seconds + 0.05 and seconds - 0.05 < run.seconds  # calibration takes most of them


def test_the_tutorials_prompts_are_for_the_tutorials_models(client):
    """The tiny model's tokenizer has other words than the bundled one's."""
    run = client.run(quantize("student.safetensors", name="general", prompts="", text_encoder=False))
    assert not run.errors and "calibrated on 64 general prompts" in run.outputs["quantize"]["text"][0]


def test_the_new_file_is_close_to_the_old_one(client, quantized):
    assert 1e-3 < relative(latent_of(client, one_step(OUT)), latent_of(client, one_step("student.safetensors"))) < 0.3


@torch.no_grad()
def test_same_noise_same_latent_as_the_library(client, quantized, modules):
    """The text encoder of OneStepLoadStudent may round activations; here the library does as it does."""
    d, cond, _, noise, t_in = library(quantized[0], modules)
    expected = sample.one_step(d, t_in)(noise, cond)
    assert relative(latent_of(client, one_step(OUT)), expected) < 0.03
    graph = one_step(OUT, model=("four", 0)) | load_4bit(OUT)
    assert relative(latent_of(client, graph), expected) < 0.03


def test_every_sampler_takes_it(client, quantized):
    expected = latent_of(client, one_step(OUT, model=("four", 0)) | load_4bit(OUT))
    stock = ksampler(OUT, 1, 1.0) | load_4bit(OUT)
    stock["sample"]["inputs"]["model"] = ["four", 0]
    close(latent_of(client, stock), expected, 1e-5)
    guider = node("BasicGuider", model=["four", 0], conditioning=["positive", 0])
    advanced = scheduled(OUT, guider) | load_4bit(OUT)
    advanced["schedule"]["inputs"]["model"] = ["four", 0]
    close(latent_of(client, advanced), expected, 1e-5)


def test_the_text_encoder_and_the_vae_of_a_whole_file_come_too(client, quantized):
    graph = one_step(OUT) | load_4bit(OUT) | {"decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2])}
    graph["image"] = node("PreviewImage", images=["decode", 0])
    expected = client.run(graph)
    graph["positive"]["inputs"]["clip"], graph["decode"]["inputs"]["vae"] = ["four", 1], ["four", 2]
    graph["sample"]["inputs"]["model"] = ["four", 0]
    found = client.run(graph)
    assert not found.errors, found.errors
    a, b = (client.latent(run.outputs["save"]["latents"][0]) for run in (found, expected))
    assert relative(a, b) < 0.03
    assert client.image(found.outputs["image"]["images"][0]).size == (64, 64)


def test_a_file_just_made_goes_straight_into_a_loader(client, folder):
    graph = one_step("student.safetensors", model=("four", 0)) | quantize("student.safetensors", name="chained")
    graph |= load_4bit(["quantize", 0])
    first = latent_of(client, graph)
    run = client.run(graph)  # nothing changed: nothing is quantized again
    assert ("executing", "quantize") not in run.events and ("progress", "quantize") not in run.events
    (folder / "chained.safetensors").unlink()
    close(latent_of(client, graph), first, 1e-6)
    assert (folder / "chained.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "bits", "budget"), [("rtn", "3", 0.0), ("svd", "4", 0.0), ("smoothquant", "8", 0.0), ("auto", "4", 5.0)]
)
def test_methods(client, method, bits, budget):
    name = f"by-{method}-{bits}-{budget:g}"
    options = {"method": method, "bits": bits, "budget": budget, "text_encoder": False}
    run = client.run(quantize("student.safetensors", name=name, **options))
    assert not run.errors, run.errors
    graph = one_step("student.safetensors", model=("four", 0)) | load_4bit(f"{name}.safetensors")
    assert relative(latent_of(client, graph), latent_of(client, one_step("student.safetensors"))) < 0.5


def test_other_files_are_quantized_by_their_weights(client, folder):
    sd = {k.removeprefix("model.diffusion_model."): t for k, t in load_file(folder / "student.safetensors").items()}
    save_file({k: t for k, t in sd.items() if "_model." not in k}, folder / "outsider.safetensors")
    run = client.run(quantize("outsider.safetensors"))
    assert not run.errors, run.errors
    assert "data-free: connect the file's MODEL and CLIP" in run.outputs["quantize"]["text"][0]
    assert len(weight.layers(load_file(folder / "outsider-4bit.safetensors"))) > 60


def test_cancel_leaves_no_file(client, server, folder):
    prompt, _ = client.queue(quantize("student.safetensors", name="never", prompts="\n".join(["a ring"] * 500)))
    while json.loads(client.socket.recv()).get("type") != "progress":
        pass
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(server.url + "/interrupt", b"", method="POST")).close()
    message = {}
    while message.get("type") != "execution_interrupted":
        message = json.loads(client.socket.recv())
        assert message["type"] not in ("execution_success", "execution_error"), message
    assert not list(folder.glob("*never*")) and not list(folder.glob(".*never*"))
    time.sleep(0.2)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../outside", "leads out of"),
        ("/tmp/outside", "leads out of"),
        ("half", "not a quantized one"),
        ("student", "the file to be quantized"),
        ("x" * 300, "a name of 3"),
    ],
)
def test_nothing_is_written_where_it_must_not_be(client, folder, name, problem):
    before = sorted(folder.parent.rglob("*"))
    run = client.run(quantize("student.safetensors", name=name))
    assert problem in run.errors["quantize"] and sorted(folder.parent.rglob("*")) == before


def test_rounding_to_nearest_gives_no_advice_on_calibration(client, server):
    before = len(server.log)
    run = client.run(quantize("student.safetensors", name="nearest", method="rtn"))
    assert "takes no calibration" in run.outputs["quantize"]["text"][0]
    assert "data-free" not in server.log[before:]


def test_a_file_that_is_gone_or_another_between_runs(client, folder):
    graph = quantize("coming.safetensors", name="going", method="rtn")
    source = tiny.write(folder / "coming.safetensors", seed=1)
    assert not client.run(graph).errors
    first = (folder / "going.safetensors").read_bytes()
    tiny.write(source, seed=2)
    assert not client.run(graph).errors and (folder / "going.safetensors").read_bytes() != first
    source.unlink()
    assert (
        "no such file" in client.run(graph).errors["quantize"] or "not in list" in client.run(graph).errors["quantize"]
    )


# ------------------------------------------------------------------------------------------------ LoRA


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
    plain = latent_of(client, one_step(OUT, model=("four", 0)) | load_4bit(OUT))
    found = latent_of(client, stock_lora(one_step("dequantized.safetensors") | load_4bit(OUT)))
    assert relative(found, expected) < 1e-3 and relative(found, plain) > 0.01
    both = latent_of(client, stock_lora(one_step(OUT) | load_4bit(OUT)))  # the text encoder in 4 bits, too
    assert relative(both, expected) < 0.03
    assert "lora key not loaded" not in server.log
    again = latent_of(client, one_step(OUT, model=("four", 0), seed=SEED) | load_4bit(OUT))
    assert torch.equal(again, plain)


# ------------------------------------------------------------------------------------------------ bad files


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


def test_wrong_options_of_the_quantizer_are_told(client, bad):
    quantized_already = client.run(quantize(OUT, name="twice"))
    assert OUT in quantized_already.errors["quantize"].splitlines()[0]
    budget = client.run(quantize("student.safetensors", method="svd", budget=4.5))
    assert "budget" in budget.errors["quantize"]
    cut = client.run(quantize("bad-cut.safetensors"))
    assert "bad-cut.safetensors: truncated" in cut.errors["quantize"] and not cut.events


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


# ------------------------------------------------------------------------------------------------ text encoders


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
