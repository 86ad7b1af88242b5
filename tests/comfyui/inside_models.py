"""Checks of inside.py: other architectures, ComfyUI's own formats beside ours, packed weights."""

import json
from pathlib import Path

import comfy.model_detection
import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from inside_helpers import (
    CPU,
    FOLDER,
    STATIC,
    TOLERANCE,
    detect,
    error,
    four_bit,
    lowrank,
    native,
    packed,
    quantized,
    rand,
    read_header,
    rounding,
    weight,
)
from safetensors.torch import load_file, save_file


def check_what_comfyuis_own_loaders_make_of_a_onestep_file():
    """distill.file.checkpoint says it: Stable Diffusion's own size is found by its shapes, other sizes are not."""
    found = {}
    for name, shapes in json.loads((FOLDER / "shapes.json").read_text()).items():
        weights = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
        found[name] = comfy.model_detection.model_config_from_unet(weights, "model.diffusion_model.")
    assert type(found["sd15"]).__name__ == "SD15" and found["tiny"] is None, found


def check_a_tokenizer_that_panics_ends_a_prompt_not_the_server():
    """A panic is no Exception: ComfyUI's thread would end at it, and no prompt would run again."""
    source, path = FOLDER / "student.safetensors", FOLDER / "panics.safetensors"
    strings = read_header(source)["__metadata__"]
    words = json.loads(strings["text_encoder"])
    words["tokenizer"]["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(z+)+$"}, "content": "z"}
    save_file(load_file(source), path, strings | {"text_encoder": json.dumps(words)})
    clip = native.load(path, [])[1]
    clip.tokenize("a red ring")
    try:
        clip.tokenize("z" * 60 + "b")
    except ValueError as e:
        assert str(e).startswith(f"{path}: metadata 'text_encoder' has no sound tokenizer"), e
    else:
        raise AssertionError("it came to an end")


def transformer(kind: str) -> tuple[dict, dict]:
    """(random weights of a tiny Flux or SD3, arguments of its forward pass)"""
    if kind == "flux":
        from comfy.ldm.flux.model import Flux as Net

        config = {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 64,
            "context_in_dim": 96, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
            "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
            "guidance_embed": True, "txt_ids_dims": [],
        }  # fmt: skip
        inputs = {"t": torch.tensor([0.5]), "guidance": torch.tensor([3.5])}
    else:
        from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper as Net

        context = {"target": "torch.nn.Linear", "params": {"in_features": 96, "out_features": 128}}
        config = {
            "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "adm_in_channels": 64,
            "context_embedder_config": context, "num_patches": 256, "pos_embed_max_size": 16,
            "pos_embed_scaling_factor": None, "qk_norm": "rms",
        }  # fmt: skip
        inputs = {"t": torch.tensor([500.0])}
    net = Net(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    sd = {}
    for i, (key, w) in enumerate(net.state_dict().items()):
        norm = key.endswith(("norm.weight", "norm.scale", "ln_q.weight", "ln_k.weight"))
        sd[key] = rand(*w.shape, seed=i) * (1 / w[0].numel() ** 0.5 if w.ndim > 1 else 0.1) + norm
    inputs |= {"x": rand(1, 16, 8, 8), "c_crossattn": rand(1, 7, 96, seed=1), "y": rand(1, 64, seed=2)}
    return sd, inputs


def velocity(patcher, inputs):
    """What the net puts out, without the input that sampling adds to it."""
    mm.unload_all_models()
    patcher.patch_model(CPU)
    i = inputs | {"guidance": inputs.get("guidance")}
    more = {"guidance": i["guidance"]} if i["guidance"] is not None else {}
    out = patcher.model.diffusion_model(i["x"], i["t"], context=i["c_crossattn"], y=i["y"], **more)
    patcher.detach()
    return out


def model_of(weights: dict):
    model, clip, vae = detect.load(Path("file"), dict(weights), {}, [], "float")
    assert clip is None
    try:
        vae.decode(torch.zeros(1, 4, 8, 8))
    except RuntimeError as e:
        assert "VAE is invalid" in str(e)
    return model


def in_diffusers_names(sd: dict, table: dict) -> dict:
    """The inverse of ComfyUI's conversion, by ComfyUI's own table."""
    out = {}
    for name, target in table.items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        if key in sd:
            w = sd[key] if offset is None else sd[key].narrow(*offset)
            out[name] = (w if function is None else function(w)).clone()  # the only function swaps halves
    return out


def check_transformers_in_either_naming():
    flux, sd3 = (comfy.utils.flux_to_diffusers, comfy.utils.mmdit_to_diffusers)
    size = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 256, "num_blocks": 2}
    for kind, table in (("flux", flux), ("sd3", sd3)):
        sd, inputs = transformer(kind)
        names = {"single file": sd, "diffusers": in_diffusers_names(sd, table(size))}
        for naming, weights in names.items():
            q, d = quantized(weights, dense=("pos_embed",))
            model = model_of(q)
            dense = comfy.sd.load_diffusion_model_state_dict({k: t.clone() for k, t in d.items()}, **STATIC)
            exact = comfy.sd.load_diffusion_model_state_dict(dict(weights), **STATIC)
            assert type(model.model) is type(dense.model), naming
            found, expected = velocity(model, inputs), velocity(dense, inputs)
            assert error(found, expected) < TOLERANCE, (kind, naming, error(found, expected))
            assert error(velocity(exact, inputs), expected) > 0.01, (kind, naming)  # it is 4 bits that we look at
            assert model.model_size() < 0.3 * dense.model_size(), (kind, naming)


def check_a_stack_of_unlike_layers_is_dense():
    sd, inputs = transformer("flux")
    size = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 256}
    q, d = quantized(in_diffusers_names(sd, comfy.utils.flux_to_diffusers(size)))
    name = "transformer_blocks.0.attn.to_k"
    q = {k: t for k, t in q.items() if not k.startswith(f"{name}.") or k.endswith("bias")} | {
        f"{name}.weight": d[f"{name}.weight"]
    }
    model = model_of(q)
    dense = comfy.sd.load_diffusion_model_state_dict(d, **STATIC)
    assert error(velocity(model, inputs), velocity(dense, inputs)) < TOLERANCE
    stacked = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert not stacked.is_quantized and model.model.diffusion_model.double_blocks[1].img_attn.qkv.is_quantized


SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "num_heads": 8,
    "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_head_channels": 64,
    "num_classes": "sequential", "adm_in_channels": 2816, "use_linear_in_transformer": True,
    "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip


def shapes_in_4_bits(sd: dict) -> dict:
    """A state dict on the meta device -> what its 4-bit file holds, with shapes only."""
    out = {}
    for key, w in sd.items():
        group = weight.group_for(w.shape[1], 64) if key.endswith(".weight") and w.ndim in (2, 4) else None
        if group is None:
            out[key] = w
            continue
        n, k = w.shape[0], w[0].numel()
        codes = torch.empty(n, k // 2, dtype=torch.int8, device="meta")
        scale = torch.empty(k // group, n, dtype=torch.float16, device="meta")
        out |= weight.QuantizedWeight(codes, scale, scale, tuple(w.shape)).to_tensors(key.removesuffix(".weight"))
    return out


def check_unets_that_stock_detection_misses():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    for name, config in (("SD15", SD15), ("SDXL", SDXL)):
        ops = comfy.ops.disable_weight_init
        sd = UNetModel(**config, dtype=torch.float16, device="meta", operations=ops).state_dict()
        file = shapes_in_4_bits(sd)
        config = comfy.model_detection.detect_unet_config(file, "")
        assert comfy.model_detection.model_config_from_unet_config(config, file) is None  # ComfyUI alone misses it
        whole = {f"model.diffusion_model.{k}": t for k, t in file.items()} | {"first_stage_model.x": torch.zeros(1)}
        found, weights = detect.recognise(Path(name), detect.diffusion_part(packed.pack(whole)), {})
        assert type(found).__name__ == name and {k: t.shape for k, t in weights.items()} == {
            k: t.shape for k, t in sd.items()
        }
        names = comfy.utils.unet_to_diffusers(found.unet_config)
        renamed = shapes_in_4_bits({k: sd[v] for k, v in names.items() if v in sd})
        found, weights = detect.recognise(Path(name), packed.pack(renamed), {})
        assert type(found).__name__ == name and weights.keys() == sd.keys()


def check_formats_of_comfyui_s_own():
    sd, inputs = transformer("sd3")
    known = [f for f in ("int8_tensorwise", "float8_e4m3fn", "nvfp4", "convrot_w4a4") if f in QUANT_ALGOS]
    assert len(known) == 4 or not STATIC  # ComfyUI 0.12 knows fewer
    for fmt in known:
        stock, mixed = {}, {}
        for key, w in sd.items():
            fits = key.endswith(".weight") and w.ndim == 2 and w.shape[1] % 64 == w.shape[0] % 16 == 0
            if not fits:
                stock[key] = mixed[key] = w
                continue
            scale = {"scale": "recalculate"} if fmt in ("nvfp4", "float8_e4m3fn") else {}
            rotation = {"convrot_groupsize": 64} if fmt == "convrot_w4a4" else {}
            t = QuantizedTensor.from_float(w, QUANT_ALGOS[fmt]["comfy_tensor_layout"], **scale, **rotation)
            mark = torch.tensor(list(json.dumps({"format": fmt} | rotation).encode()), dtype=torch.uint8)
            entries = t.state_dict(key) | {key[:-6] + "comfy_quant": mark}
            stock |= entries
            mixed |= entries if len(stock) % 2 else rounding.round_to_nearest(w, 4, 64).to_tensors(key[:-7])
        found = velocity(model_of(stock), inputs)
        exact = comfy.sd.load_diffusion_model_state_dict(dict(sd), **STATIC)
        assert error(found, velocity(exact, inputs)) < 0.5, fmt
        if fmt != "nvfp4":  # there ComfyUI itself takes the packed width of a layer for the model's
            theirs = comfy.sd.load_diffusion_model_state_dict(dict(stock), **STATIC)
            assert torch.equal(found, velocity(theirs, inputs)), fmt
        both = model_of(mixed)
        assert list(both.quantized()) and error(velocity(both, inputs), velocity(exact, inputs)) < 0.5, fmt


def check_scaled_fp8_of_old():
    sd, inputs = transformer("sd3")
    file = {"model.diffusion_model.scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, w in sd.items():
        layer, key = key.removesuffix(".weight"), f"model.diffusion_model.{key}"
        if key.endswith(".weight") and w.ndim == 2 and "embed" not in key:
            file[f"model.diffusion_model.{layer}.scale_weight"] = w.abs().max() / 448
            w = (w / w.abs().max() * 448).to(torch.float8_e4m3fn)
        file[key] = w
    save_file(file, FOLDER / "fp8.safetensors")
    model = four_bit.load_file(FOLDER / "fp8.safetensors", [], "float")[0]
    exact = comfy.sd.load_diffusion_model_state_dict(dict(sd), **STATIC)
    assert 1e-4 < error(velocity(model, inputs), velocity(exact, inputs)) < 0.1
    assert model.model_size() < 0.5 * exact.model_size()


def check_a_dense_file_loads_as_it_is():
    sd, inputs = transformer("sd3")
    model = model_of(sd)
    dense = comfy.sd.load_diffusion_model_state_dict(dict(sd), **STATIC)
    assert not list(model.quantized()) and torch.equal(velocity(model, inputs), velocity(dense, inputs))


def check_wrong_shapes_name_the_file_and_the_weight():
    sd, _ = transformer("sd3")
    q, _ = quantized(sd, dense=("pos_embed",))
    name = "joint_blocks.1.x_block.mlp.fc1"
    q |= rounding.round_to_nearest(rand(64, 128), 4, 32).to_tensors(name)
    try:
        detect.load(Path("/models/bent.safetensors"), q, {}, [])
    except ValueError as e:
        assert "bent.safetensors: wrong weights" in str(e) and name in str(e) and "(64, 128)" in str(e), e
    else:
        raise AssertionError("it loaded")


# ------------------------------------------------------------------------------------------------- Packed


def check_packed_weights_cut_and_join():
    w = lowrank.svd(rand(96, 64), 4, 32, 4)
    p = packed.Packed(w, torch.float32)
    dense = w.dequantize()
    assert p.shape == (96, 64) and p.dtype == torch.float32 and p.numel() == 96 * 64
    for rows in (*p.chunk(3), p[5:40], p.narrow(0, 1, 7), p.split([90, 6])[1], p.detach(), p.clone(), p.half()[:5]):
        assert isinstance(rows, packed.Packed) or rows.dtype == torch.float16
    assert torch.equal(p[5:40].dense(), dense[5:40]) and torch.equal(p.chunk(3)[1].dense(), dense[32:64])
    joined = torch.cat(p.split([32, 4, 60]))
    assert isinstance(joined, packed.Packed) and error(joined.dense(), dense) < 1e-6
    assert error(p.t() @ torch.ones(96, 2), dense.t() @ torch.ones(96, 2)) < 1e-6
    try:
        p.mul_(2)
    except TypeError:
        pass
    else:
        raise AssertionError("it was written into")
