"""Other makers' files against their makers' own arithmetic: gguf.dequantize, bitsandbytes, nunchaku."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distill.packed.formats import ggml, read, regroup
from distill.packed.layers import install
from distill.packed.weight import QuantizedWeight, layers

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
DECODED = [(number, kind) for number, kind in ggml.KINDS.items() if kind.decode]


def random_blocks(kind: ggml.Kind, blocks: int, seed: int = 0) -> np.ndarray:
    """Bytes of sound blocks: random codes; wherever float16 scales may stand, no infinities (byte values < 0x70)."""
    raw = np.random.default_rng(seed).integers(0, 256, (blocks, kind.nbytes), dtype=np.uint8)
    for at in {"Q6_K": (209,), "Q3_K": (109,), "Q2_K": (81, 83)}.get(kind.name, (1, 3)):
        raw[:, at] &= 0xBB  # exponent bits not all ones
    return raw


def write_gguf(path: Path, tensors: dict, arch: str | None = "flux", shapes: dict | None = None) -> Path:
    """tensors: name -> (array as gguf stores it, ggml type)."""
    writer = gguf.GGUFWriter(path, arch or "none")
    if arch is None:
        writer.kv_data[0].pop("general.architecture")
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    writer.add_uint32("answer", 42)
    writer.add_array("tokens", ["a", "bc"] * 20)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("number, kind", DECODED, ids=[k.name for _, k in DECODED])
def test_blocks_are_ggufs_numbers(number, kind):
    raw = random_blocks(kind, 50)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(number))
    assert np.isfinite(expected).all()
    got = regroup.dense(kind.decode(torch.from_numpy(raw)), (50, kind.block))
    assert np.abs(got.numpy() - expected).max() <= 2e-7 * np.abs(expected).max()


@pytest.mark.parametrize("number, kind", DECODED, ids=[k.name for _, k in DECODED])
def test_a_gguf_layer_is_exact(tmp_path, number, kind):
    q = gguf.GGMLQuantizationType(number)
    raw = random_blocks(kind, 6 * 512 // kind.block).reshape(6, -1)
    path = write_gguf(tmp_path / "m.bin", {"blocks.0.weight": (raw, q)})
    loaded = read(path)
    assert loaded.kind == "gguf" and loaded.metadata["general.architecture"] == "flux"
    assert loaded.metadata["answer"] == "42"
    w = QuantizedWeight.from_tensors(loaded.weights, "blocks.0")
    expected = torch.from_numpy(gguf.dequantize(raw, q))
    assert w.shape == (6, 512) and w.bits == (8 if kind.name[:2] in ("Q5", "Q6", "Q8") else 4)
    assert (w.dequantize() - expected).abs().max() <= 2e-7 * expected.abs().max()


def test_gguf_dense_types_and_tables(tmp_path):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(4, 64, generator=g)
    half, brain = w.half().numpy(), w.bfloat16().view(torch.int16).numpy().view(np.uint8).reshape(4, -1)
    Q = gguf.GGMLQuantizationType
    q8 = gguf.quantize(w.numpy(), Q.Q8_0)
    path = write_gguf(
        tmp_path / "m",
        {
            "a.weight": (w.numpy(), Q.F32),
            "b.weight": (half, Q.F16),
            "c.weight": (brain, Q.BF16),
            "token_embd.weight": (q8, Q.Q8_0),
        },
    )
    weights = read(path).weights
    assert weights["a.weight"].dtype == torch.float32 and torch.equal(weights["a.weight"], w)
    assert torch.equal(weights["b.weight"], w.half())
    assert weights["c.weight"].dtype == torch.bfloat16 and torch.equal(weights["c.weight"], w.bfloat16())
    table = weights["token_embd.weight"]  # a lookup's: dense
    assert table.dtype == torch.float16 and torch.equal(table, torch.from_numpy(gguf.dequantize(q8, Q.Q8_0)).half())
    assert not layers(weights)


def test_gguf_shapes_that_were_folded(tmp_path, caplog):
    """ComfyUI-GGUF stores what has no rows of 256 as (n / 256, 256), and the true shape beside it."""
    g = torch.Generator().manual_seed(2)
    Q = gguf.GGMLQuantizationType
    linear, point, conv, odd = (torch.randn(s, generator=g) for s in ((8, 320), (8, 64, 1, 1), (8, 64, 3, 3), (32, 24)))
    tensors, shapes, expected = {}, {}, {}
    for name, w in {"linear": linear, "point": point, "conv": conv, "odd": odd}.items():
        raw = gguf.quantize(w.numpy().reshape(-1, 256), Q.Q4_0)
        tensors[f"{name}.weight"], shapes[f"{name}.weight"] = (raw, Q.Q4_0), w.shape
        expected[name] = torch.from_numpy(gguf.dequantize(raw, Q.Q4_0)).view(w.shape)
    weights = read(write_gguf(tmp_path / "m", tensors, "sd1", shapes)).weights
    assert sorted(layers(weights)) == ["conv", "linear", "point"]
    for name in ("linear", "point", "conv"):
        assert torch.equal(QuantizedWeight.from_tensors(weights, name).dequantize(), expected[name])
    assert torch.equal(weights["odd.weight"], expected["odd"].half())
    assert "1 weights made dense" in caplog.text and "odd.weight" in caplog.text


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_u_nets_gguf_stays_the_size_of_its_file_and_exact(tmp_path, kind):
    """Convolutions too, loaded into layers that compute: nothing is rounded again, nothing grows."""
    Q = gguf.GGMLQuantizationType[kind]
    g = torch.Generator().manual_seed(2)
    shapes = ((64, 32, 3, 3), (64, 64, 3, 3), (128, 64, 1, 1), (64, 128, 4, 4), (96, 32, 1, 3), (256, 64))
    net, tensors, true, expected = torch.nn.ModuleDict(), {}, {}, {}
    for i, shape in enumerate(shapes):
        raw = gguf.quantize(torch.randn(shape, generator=g).numpy().reshape(-1, 256), Q)
        tensors[f"{i}.weight"], true[f"{i}.weight"] = (raw, Q), shape
        expected[str(i)] = torch.from_numpy(gguf.dequantize(raw, Q)).view(shape)
        of, sides = (torch.nn.Conv2d, [shape[2:]]) if len(shape) == 4 else (torch.nn.Linear, [])
        net[str(i)] = of(*shape[1::-1], *sides, bias=False, device="meta")
    assert not install(net, read(write_gguf(tmp_path / "m", tensors, "sd1", true)).weights)
    held = sum(b.nbytes for m in net.values() for b in m.buffers())
    assert held <= 1.05 * sum(raw.nbytes for raw, _ in tensors.values())
    for name, layer in net.items():
        assert torch.equal(layer.get_quantized().dequantize(), expected[name])
        saved = QuantizedWeight.from_tensors({f"{name}.{k}": t for k, t in layer.state_dict().items()}, name)
        assert torch.equal(saved.dequantize(), expected[name])


@pytest.mark.parametrize("architecture", ["sdxl", None])
def test_sdxls_projections_are_linear(tmp_path, architecture):
    """stable-diffusion.cpp, which names no architecture, stores them as 1x1 convolutions."""
    Q = gguf.GGMLQuantizationType
    w = torch.randn(32, 64, 1, 1, generator=torch.Generator().manual_seed(6))
    name = "input_blocks.4.1.proj_in"
    tensors = {
        f"{name}.weight": (gguf.quantize(w.flatten(1).numpy(), Q.Q8_0), Q.Q8_0),
        "label_emb.0.0.weight": (np.ones((4, 4), np.float32), Q.F32),
    }
    path = write_gguf(tmp_path / "m", tensors, architecture, {f"{name}.weight": w.shape})
    shape = QuantizedWeight.from_tensors(read(path).weights, name).shape
    assert shape == (tuple(w.shape) if architecture else (32, 64))


def test_t5_in_llama_cpps_names(tmp_path):
    Q = gguf.GGMLQuantizationType
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)).numpy()
    names = {
        "token_embd.weight": "shared.weight",
        "enc.blk.0.attn_q.weight": "encoder.block.0.layer.0.SelfAttention.q.weight",
        "enc.blk.0.attn_rel_b.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "enc.blk.11.ffn_down.weight": "encoder.block.11.layer.1.DenseReluDense.wo.weight",
        "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    }
    path = write_gguf(tmp_path / "m", {n: (gguf.quantize(w, Q.Q8_0), Q.Q8_0) for n in names}, "t5encoder")
    weights = read(path).weights
    assert {k for k in weights if k.endswith(".weight")} == set(names.values())
    assert layers(weights) == [names["enc.blk.0.attn_q.weight"][:-7], names["enc.blk.11.ffn_down.weight"][:-7]]


# --------------------------------------------------------------------------------------------- safetensors as they are


def quantized(n: int = 16, k: int = 64, group: int = 32) -> QuantizedWeight:
    g = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (n, k // 2), generator=g).to(torch.int8)
    scale = torch.rand(k // group, n, generator=g).half()
    return QuantizedWeight(codes, scale, -scale, (n, k))


def mark(**spec) -> torch.Tensor:
    return torch.tensor(list(json.dumps(spec).encode()), dtype=torch.uint8)


def test_our_files_and_dense_ones(tmp_path):
    w = quantized()
    dense = {"x.weight": torch.randn(3, 4), "x.bias": torch.randn(3)}
    save_file(dense, tmp_path / "dense", {"a": "b"})
    loaded = read(tmp_path / "dense")
    assert loaded.kind == "dense" and loaded.metadata == {"a": "b"}
    assert all(torch.equal(loaded.weights[k], v) for k, v in dense.items())
    save_file(dense | w.to_tensors("y"), tmp_path / "ours")
    loaded = read(tmp_path / "ours")
    assert loaded.kind == "onestep"
    assert torch.equal(QuantizedWeight.from_tensors(loaded.weights, "y").dequantize(), w.dequantize())


def test_stock_formats_pass_untouched(tmp_path):
    tensors = {
        "y.weight": torch.randint(-128, 127, (8, 16), dtype=torch.int8),
        "y.weight_scale": torch.rand(8, 1),
        "y.comfy_quant": mark(format="int8_tensorwise"),
    }
    save_file(tensors, tmp_path / "m")
    loaded = read(tmp_path / "m")
    assert loaded.kind == "comfy_quant" and loaded.weights.keys() == tensors.keys()
    assert all(torch.equal(loaded.weights[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_of_2025_gets_todays_names(tmp_path, dtype):
    prefix, fp8 = "model.diffusion_model.", torch.ones(4, 4).to(dtype)
    tensors = {
        f"{prefix}scaled_fp8": torch.zeros(2).to(dtype),
        f"{prefix}y.weight": fp8,
        f"{prefix}y.scale_weight": torch.tensor(2.0),
        f"{prefix}y.scale_input": torch.tensor(3.0),
        f"{prefix}z.weight": fp8.clone(),
        f"{prefix}z.scale_weight": torch.tensor(4.0),
        f"{prefix}z.scale_input": torch.tensor(1.0),
        "elsewhere.scale_weight": torch.tensor(5.0),
    }
    save_file(tensors, tmp_path / "m")
    loaded = read(tmp_path / "m")
    assert loaded.kind == "scaled_fp8"
    expected = {f"{prefix}{regroup}.{k}" for regroup in "yz" for k in ("weight", "weight_scale", "comfy_quant")}
    assert loaded.weights.keys() == expected | {f"{prefix}y.input_scale", "elsewhere.scale_weight"}
    spec = json.loads(loaded.weights[f"{prefix}y.comfy_quant"].numpy().tobytes())
    assert spec == {"format": str(dtype).removeprefix("torch."), "full_precision_matrix_mult": True}
    assert loaded.weights[f"{prefix}z.weight_scale"] == 4


def test_marks_may_stand_in_the_metadata(tmp_path):
    tensors = quantized().to_tensors("y")
    spec = json.loads(tensors.pop("y.comfy_quant").numpy().tobytes())
    save_file(tensors, tmp_path / "m", {"_quantization_metadata": json.dumps({"layers": {"y": spec}})})
    loaded = read(tmp_path / "m")
    assert loaded.kind == "onestep" and layers(loaded.weights) == ["y"]


# ------------------------------------------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("scales", ["plain", "nested"])
def test_bitsandbytes_own_numbers(book, scales):
    """Against a file that bitsandbytes 0.50 wrote, with what its dequantize_4bit gave."""
    loaded = read(Path(__file__).parent / "bitsandbytes.safetensors")
    assert loaded.kind == "nf4" and not any("quant_state" in k or "absmax" in k for k in loaded.weights)
    w = QuantizedWeight.from_tensors(loaded.weights, f"{book}.{scales}")
    assert w.format == "onestep_codebook" and w.group_size == 64 and w.bits_per_weight < 6
    expected = loaded.weights[f"{book}.{scales}.expected"]
    tolerance = 0 if scales == "plain" else 3e-7 * expected.abs().max()  # its nested scales: another order of adding
    assert (w.dequantize() - expected).abs().max() <= tolerance


def nf4_tensors(shape: tuple[int, ...], codes: torch.Tensor, scale: torch.Tensor, book: torch.Tensor) -> dict:
    """The format's description, written out: high nibble first, one scale for 64 numbers."""
    flat = codes.flatten().to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(shape)}
    return {
        "y.weight": (flat[0::2] * 16 + flat[1::2]).unsqueeze(1),
        "y.weight.absmax": scale,
        "y.weight.quant_map": book,
        "y.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        "y.bias": torch.ones(shape[0]),
    }


@pytest.mark.parametrize("shape", [(6, 128), (4, 16, 2, 2), (32, 36)])
def test_nf4_of_any_shape(tmp_path, shape, caplog):
    g = torch.Generator().manual_seed(5)
    count = torch.Size(shape).numel()
    codes, scale = torch.randint(0, 16, (count // 64, 64), generator=g), torch.rand(count // 64, generator=g)
    book = torch.linspace(-1, 1, 16)
    save_file(nf4_tensors(shape, codes, scale, book), tmp_path / "m")
    weights = read(tmp_path / "m").weights
    expected = (book[codes] * scale[:, None]).view(shape)
    assert torch.equal(weights["y.bias"], torch.ones(shape[0]))
    if shape != (32, 36):
        assert torch.equal(QuantizedWeight.from_tensors(weights, "y").dequantize(), expected)
    else:  # rows of 36 hold no whole block
        assert torch.equal(weights["y.weight"], expected.half()) and "y.weight" in caplog.text
