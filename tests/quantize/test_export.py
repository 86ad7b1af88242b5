"""Files for others: each is read back by the package that defines its format."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill.file import checkpoint
from distill.header import CheckpointError
from distill.packed.formats import read
from distill.packed.weight import QuantizedWeight, layers
from distill.quantize.export import write

STOCK = ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8", "nvfp4")


def unet() -> dict[str, torch.Tensor]:
    """An SDXL in miniature: the layers that decide what is quantized, in LDM's names."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "input_blocks.0.0.weight": (64, 4, 3, 3),
        "label_emb.0.0.weight": (256, 128),
        "time_embed.0.weight": (256, 64),
        "input_blocks.1.0.emb_layers.1.weight": (64, 256),
        "input_blocks.1.0.in_layers.2.weight": (64, 64, 3, 3),
        "input_blocks.1.1.norm.weight": (64,),
        "input_blocks.1.1.proj_in.weight": (64, 64, 1, 1),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (128, 192),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_v.weight": (128, 192),
        "input_blocks.10.1.transformer_blocks.0.attn2.to_k.weight": (128, 192),
        "middle_block.1.transformer_blocks.0.ff.net.2.weight": (64, 256),
        "middle_block.1.transformer_blocks.0.odd.weight": (64, 36),
        "out.2.weight": (4, 64, 3, 3),
    }
    weights = {k: torch.randn(s, generator=g) * 0.1 for k, s in shapes.items()}
    return weights | {"middle_block.1.transformer_blocks.0.ff.net.2.bias": torch.randn(64, generator=g)}


def quantized(weights: dict[str, torch.Tensor]) -> set[str]:
    parts = ("emb_layers.1.weight", "to_v.weight", "net.2.weight")
    return {k.removesuffix(".weight") for k in weights if k.endswith(parts) or ".10." in k}


def stock_weight(path, layer: str, shape: tuple[int, ...]) -> torch.Tensor:
    """As ComfyUI's loader makes it: parameters by their names in the file, then the layout's own dequantize."""
    from comfy_kitchen import tensor as kitchen

    with safe_open(path, "pt") as f:
        t = {k.removeprefix(layer + "."): f.get_tensor(k) for k in f.keys() if k.startswith(layer + ".")}
    spec = json.loads(t["comfy_quant"].numpy().tobytes())
    common = {"orig_dtype": torch.float32, "orig_shape": shape}
    rotation = spec.get("convrot_groupsize")
    if spec["format"] == "int8_tensorwise":
        layout, params = kitchen.TensorWiseINT8Layout, {"scale": t["weight_scale"]}
    elif spec["format"] == "convrot_w4a4":
        layout, params = (
            kitchen.TensorCoreConvRotW4A4Layout,
            {"scale": t["weight_scale"], "convrot_groupsize": rotation},
        )
    elif spec["format"] == "nvfp4":
        layout = kitchen.TensorCoreNVFP4Layout
        params = {"scale": t["weight_scale_2"], "block_scale": t["weight_scale"].view(torch.float8_e4m3fn)}
    else:
        layout, params = (
            kitchen.AsymW4A8Int8Layout,
            {
                "scale": t["weight_s_rel"],
                "s_channel": t["weight_s_channel"],
                "codebook": t["weight_codebook"],
                "correction": t.get("weight_correction"),
                "group_size": spec["group_size"],
                "convrot_groupsize": rotation,
            },
        )
    return layout.dequantize(t["weight"], layout.Params(**params, **common))


@pytest.mark.parametrize("format", STOCK)
def test_stock_formats_decode_by_their_own_layouts(tmp_path, format):
    pytest.importorskip("comfy_kitchen", reason="needs comfy-kitchen: pip install comfy-kitchen")
    weights, path = unet(), tmp_path / "m.safetensors"
    done = write(path, weights, {"a": "b"}, format)
    assert set(done.layers) == quantized(weights)
    bound = {"int8_tensorwise": 0.01, "asym_w4a8_int8": 0.09}.get(format, 0.14)
    for layer, error in done.layers.items():
        w = weights[f"{layer}.weight"]
        back = stock_weight(path, layer, tuple(w.shape)).float()
        assert abs((back - w).norm() / w.norm() - error) < 1e-4 and 0 < error < bound
    assert "detection" in done.dense["input_blocks.4.1.transformer_blocks.0.attn2.to_k"]
    assert done.dense["input_blocks.1.0.in_layers.2"] == "a convolution"
    assert "36 columns" in done.dense["middle_block.1.transformer_blocks.0.odd"]
    assert done.dense["label_emb.0.0"] == "not chosen"
    loaded = read(path)
    assert loaded.kind == "comfy_quant" and loaded.metadata == {"a": "b"}
    assert loaded.weights["input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"].shape == (128, 192)
    assert loaded.weights["out.2.weight"].dtype == torch.float16


def test_a_whole_checkpoint_and_chosen_layers(tmp_path):
    pytest.importorskip("comfy_kitchen", reason="needs comfy-kitchen: pip install comfy-kitchen")
    weights = {"model.diffusion_model." + k: v for k, v in unet().items()}
    weights["cond_stage_model.transformer.layers.0.q.weight"] = torch.randn(64, 64)
    chosen = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2"
    done = write(tmp_path / "m", weights, {}, "int8_tensorwise", only={chosen})
    assert set(done.layers) == {chosen}
    loaded = read(tmp_path / "m").weights
    text = "cond_stage_model.transformer.layers.0.q.weight"
    assert torch.equal(loaded[text], weights[text]) and layers(loaded) == [chosen]


def test_diffusers_names_become_ldms(tmp_path):
    pytest.importorskip("comfy_kitchen", reason="needs comfy-kitchen: pip install comfy-kitchen")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    weights = {
        "conv_in.weight": torch.randn(8, 4, 3, 3),
        "down_blocks.0.resnets.1.conv1.weight": torch.randn(8, 8, 3, 3),
        "down_blocks.1.resnets.1.conv1.weight": torch.randn(8, 8, 3, 3),
        f"{name}.weight": torch.randn(64, 128),
    }
    done = write(tmp_path / "m", weights, {}, "nvfp4", only={name})
    assert list(done.layers) == ["input_blocks.4.1.transformer_blocks.0.ff.net.2"]
    assert "input_blocks.2.0.in_layers.2.weight" in read(tmp_path / "m").weights


def test_a_layer_of_ours_is_dequantized_first(tmp_path):
    pytest.importorskip("comfy_kitchen", reason="needs comfy-kitchen: pip install comfy-kitchen")
    codes = torch.randint(-128, 128, (64, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    w = QuantizedWeight(codes, torch.rand(4, 64) * 0.1, None, (64, 128))
    weights = unet() | w.to_tensors("middle_block.1.transformer_blocks.0.ours")
    done = write(tmp_path / "m", weights, {}, "int8_tensorwise")
    assert "middle_block.1.transformer_blocks.0.ours" in done.layers
    back = stock_weight(tmp_path / "m", "middle_block.1.transformer_blocks.0.ours", (64, 128))
    assert (back - w.dequantize()).norm() < 0.01 * w.dequantize().norm()
    assert not any("weight_zero" in k or "ours.weight_scale_" in k for k in read(tmp_path / "m").weights)


def test_the_contract_is_kitchens_awq_layout(tmp_path):
    """A 4-bit layer of ours means the same to comfy-kitchen's eager kernel, and one under its names the same to us."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="needs comfy-kitchen: pip install comfy-kitchen")
    g = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (16, 64), generator=g).to(torch.int8)
    w = QuantizedWeight(codes, torch.rand(2, 16, generator=g), torch.randn(2, 16, generator=g), (16, 128))
    layout = kitchen.TensorCoreAWQW4A16Layout
    common = {"group_size": 64, "orig_dtype": torch.float32, "orig_shape": w.shape}
    params = layout.Params(scale=w.scale, zeros=w.zero, **common)
    assert torch.allclose(layout.dequantize(codes, params).float(), w.dequantize(), rtol=0, atol=1e-6)
    x = torch.randn(3, 128, generator=g)
    y = torch.nn.functional.linear(x, kitchen.QuantizedTensor(codes, "TensorCoreAWQW4A16Layout", params))
    assert (y - x @ w.dequantize().t()).norm() < 1e-5 * y.norm()
    theirs = {f"y.weight{s}": t for s, t in layout.state_dict_tensors(codes, params).items()}
    theirs["y.comfy_quant"] = torch.tensor(list(b'{"format": "awq_w4a16", "group_size": 64}'), dtype=torch.uint8)
    save_file(theirs, tmp_path / "m")
    loaded = read(tmp_path / "m")
    assert loaded.kind == "onestep"
    assert torch.equal(QuantizedWeight.from_tensors(loaded.weights, "y").dequantize(), w.dequantize())


def test_unknown_formats_and_models(tmp_path):
    for format in ("int3", "gguf:Q4_K", "convrot_w4a4:int2"):
        with pytest.raises(CheckpointError, match="Choose one"):
            write(tmp_path / "m", unet(), {}, format)
    with pytest.raises(CheckpointError, match="no layer takes format nvfp4"):
        write(tmp_path / "m", {"x.weight": torch.ones(3, 3)}, {}, "nvfp4")
    with pytest.raises(CheckpointError, match="no name for this model"):
        write(tmp_path / "m", {"x.weight": torch.ones(3, 3)}, {}, "gguf")
    flux = {"single_transformer_blocks.0.attn.to_q.weight": torch.ones(64, 64)}
    for format in ("int8_tensorwise", "gguf"):
        with pytest.raises(CheckpointError, match="diffusers' names"):
            write(tmp_path / "m", flux, {}, format)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_gguf_is_read_by_its_own_package(tmp_path, kind):
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    weights, path = unet(), tmp_path / "m.gguf"
    weights["x.scale_shift"] = torch.randn(1, 2, 3, 4, 5)
    done = write(path, weights, {"license": "Apache-2.0"}, f"gguf:{kind}")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "sdxl"
    assert reader.get_field("license").contents() == "Apache-2.0"
    found = {t.name: t for t in reader.tensors}
    assert found.keys() == weights.keys()
    for name, w in weights.items():
        field = reader.get_field(f"comfy.gguf.orig_shape.{name}")
        shape = tuple(field.contents()) if field else tuple(reversed(found[name].shape.tolist()))
        assert shape == tuple(w.shape)
        back = torch.from_numpy(gguf.dequantize(found[name].data, found[name].tensor_type).reshape(shape).copy())
        layer = name.removesuffix(".weight")
        error = (back - w).norm() / w.norm()
        if layer in done.layers:
            assert found[name].tensor_type.name == kind and abs(error - done.layers[layer]) < 1e-5
            assert error < {"Q8": 0.01, "Q5": 0.05}.get(kind[:2], 0.1)
        else:
            assert error < 0.003 and found[name].tensor_type.name in ("F32", "F16", "BF16")
    inside = {"input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in", *quantized(weights)}
    if kind[0] == "Q":
        assert inside <= set(done.layers) and not {"input_blocks.0.0", "out.2"} & set(done.layers)
    ours = read(path)  # and by ours
    for layer in quantized(weights) & set(done.layers):
        w = QuantizedWeight.from_tensors(ours.weights, layer).dequantize()
        back = gguf.dequantize(found[f"{layer}.weight"].data, found[f"{layer}.weight"].tensor_type)
        assert (w - torch.from_numpy(back).view(w.shape)).abs().max() < 1e-6


def test_gguf_of_t5_and_of_a_onestep_file(tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    g = torch.Generator().manual_seed(2)
    t5 = {
        "shared.weight": torch.randn(32, 64, generator=g),
        "encoder.embed_tokens.weight": torch.zeros(32, 64),
        "encoder.final_layer_norm.weight": torch.randn(64, generator=g),
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.randn(64, 64, generator=g),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.randn(32, 4, generator=g),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": torch.randn(64, 64, generator=g),
    }
    write(tmp_path / "t5", t5, {}, "gguf:Q8_0")
    loaded = read(tmp_path / "t5")
    assert loaded.metadata["general.architecture"] == "t5encoder"
    assert {k for k in loaded.weights if k.endswith(".weight")} == t5.keys() - {"encoder.embed_tokens.weight"}
    assert layers(loaded.weights) == [k.removesuffix(".weight") for k in t5 if "SelfAttention.q" in k or "wi_0" in k]
    unets = {"model.diffusion_model." + k: v for k, v in unet().items()} | {"first_stage_model.x": torch.ones(3)}
    done = write(tmp_path / "ordinary", unets, {}, "gguf")
    assert done.left_out == ["first_stage_model.x"] and "out.2.weight" in read(tmp_path / "ordinary").weights
    write(tmp_path / "student", unets, {"onestep.version": "1"}, "gguf")
    loaded = read(tmp_path / "student")
    assert loaded.metadata["onestep.version"] == "1" and torch.equal(
        loaded.weights["first_stage_model.x"], torch.ones(3)
    )


def test_a_onestep_file_as_gguf_is_one_still(tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    path, out = tmp_path / "s.safetensors", tmp_path / "s.gguf"
    tiny.write(path)
    original = checkpoint.read(path)
    done = write(out, original.weights, original.meta.to_strings(), "gguf:Q8_0")
    assert done.layers and not done.left_out
    found = checkpoint.read(out)
    assert found.meta == original.meta
    one, other = tiny.build(path), tiny.build(out)
    g, config = torch.Generator().manual_seed(4), one.unet.config
    x, c = (
        torch.randn(1, config.in_channels, 8, 8, generator=g),
        torch.randn(1, 7, config.cross_attention_dim, generator=g),
    )
    pooled = torch.randn(1, config.projection_class_embeddings_input_dim, generator=g)
    with torch.no_grad():
        a, b = (m.unet(x, 500, c, class_labels=pooled).sample for m in (one, other))
    assert 0 < (a - b).norm() < 0.03 * a.norm()
    assert set(tmp_path.iterdir()) == {path, out}
