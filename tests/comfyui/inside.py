"""Checks that need ComfyUI's own objects in hand: ComfyUI's interpreter runs this file for test_4bit_inside.py.

`inside.py OUT FOLDER [PART]`: runs every function called check_* (with PART in its name) on the tiny student in FOLDER
and writes {name: "" or the traceback} to OUT.
"""

import gc
import importlib
import json
import sys
import time
import traceback
import types
from pathlib import Path

PACK = Path(__file__).absolute().parents[2]
OUT, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
ONLY = sys.argv[3] if len(sys.argv) > 3 else ""
sys.path.insert(0, ".")
sys.argv = ["main.py"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True
sys.modules["pack"] = package = types.ModuleType("pack")  # as ComfyUI does: a folder as a package of another name
package.__path__ = [str(PACK)]

import comfy.hooks  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_grad_enabled(False)


def imported(name: str):
    return importlib.import_module("pack." + name)


native, detect, packed = (imported(f"nodes.native{n}") for n in ("", ".detect", ".packed"))
four_bit, sample = imported("nodes.four_bit"), imported("nodes.sample")
rounding, weight = imported("distill.quant.rounding"), imported("distill.quant.weight")
read_header, lowrank = imported("distill.metadata").read_header, imported("distill.quant.lowrank")
CPU = torch.device("cpu")
TOLERANCE = 1e-5  # both sides compute in fp32


# ------------------------------------------------------------------------------------------------- helpers


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


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------------- a OneStep file


def check_the_same_numbers_as_the_dense_file():
    q, d = pair()
    assert len(list(q[0].quantized())) > 60 and len(list(q[1].patcher.quantized())) >= 12
    assert error(image(*q), image(*d)) < TOLERANCE
    again = native.load(FOLDER / "inside-4.safetensors", [])[0].clone(force_deepcopy=True)  # for a second GPU
    assert type(again) is type(q[0]) and error(image(again, q[1]), image(*d)) < 0.1


def check_memory_is_counted_packed():
    q, d = pair()
    file = weight_bytes(FOLDER / "inside-4.safetensors", "model.diffusion_model.")
    assert abs(q[0].model_size() - file) < 0.01 * file and q[0].model_size() < 0.3 * d[0].model_size()
    image(*q)
    assert q[0].loaded_size() == q[0].model_size() == mm.module_size(q[0].model)


def weight_bytes(path, prefix):
    return sum(t.nbytes for k, t in load_file(path).items() if k.startswith(prefix))


# ------------------------------------------------------------------------------------------------- LoRA


def check_lora_of_every_kind_is_exact_and_goes_again():
    q, d = pair()
    plain, dense = image(*q), image(*d)
    for kind in ("lora", "locon", "dora", "loha", "lokr", "diff"):
        file = lora(*d, kind)
        a, b = with_lora(q, (file, 1.0)), with_lora(d, (file, 1.0))
        patched, expected = image(*a), image(*b)
        assert error(patched, expected) < 1e-4, (kind, error(patched, expected))
        assert error(expected, dense) > 0.01, kind
        assert mm.module_size(q[0].model) == q[0].model_size(), kind  # still packed
        assert torch.equal(image(*q), plain) and torch.equal(image(*a), patched), kind


def check_loras_stack_and_strengths_change():
    q, d = pair()
    one, two, other = lora(*d, "lora"), lora(*d, "lora", seed=1), lora(*d, "lokr", 0.02)
    a, b = with_lora(q, (one, 1.0)), with_lora(d, (one, 1.0))
    for more in ([(two, 0.5)], [(two, -1.3)], [(two, 0.0)], [(two, 0.5), (other, 0.3)], [(other, 1.0), (two, 2.0)]):
        assert error(image(*with_lora(a, *more)), image(*with_lora(b, *more))) < 1e-4, more[0][1]
    taken_back = image(*with_lora(a, (one, -1.0)))
    assert error(taken_back, image(*q)) < 1e-4  # the branches cancel
    for strength in (0.25, 1.5):
        assert error(image(*with_lora(q, (one, strength))), image(*with_lora(d, (one, strength)))) < 1e-4


def check_lora_with_a_low_rank_branch_in_the_file():
    q, d = pair(rank=8)
    assert any(layer.get_quantized().up is not None for _, layer in q[0].quantized())
    file = lora(*d, "lora")
    assert error(image(*with_lora(q, (file, 1.0))), image(*with_lora(d, (file, 1.0)))) < 1e-4


def check_lora_beside_rounded_activations():
    """Where the layers round their input, the branches do not: what a LoRA adds is what it adds to exact layers."""
    (q, clip), d = pair()
    for key, layer in q.quantized():
        x = rand(3, layer.in_channels, 8, 8) if isinstance(layer, torch.nn.Conv2d) else rand(64, layer.in_features)
        layer.activations = "int8"
        plain = layer(x)
        adapter = comfy.lora.weight_adapter.lora.LoRAAdapter
        up, down = rand(layer.dense_shape[0], 4), rand(4, layer.dense_shape[1:].numel(), seed=1)
        patch = (0.5, adapter(set(), (up, down, 2.0, None, None, None)), 1.0, None, None)
        layer.set_patches(key, [patch])
        added = layer(x) - plain
        low = (0.25 * up @ down).view(layer.dense_shape)
        expected = layer._conv_forward(x, low, None) if x.ndim == 4 else x @ low.t()
        assert error(added, expected) < 1e-4, key
        layer.set_patches(key, [])
        assert torch.equal(layer(x), plain), key


def check_lora_in_low_vram():
    q, d = pair()
    plain = call(q[0])
    q[0].detach()
    for more in ([("lora", 0.05)], [("lora", 0.05), ("lokr", 0.02)], [("diff", 0.05)]):
        files = [(lora(*d, kind, size), 1.0) for kind, size in more]
        a, b = with_lora(q, *files)[0], with_lora(d, *files)[0]
        expected = call(b)
        b.detach()
        for memory in (1, a.model_size() // 2, 4 * a.model_size()):
            assert error(call(a, memory), expected) < 1e-4, (more, memory)
            assert a.loaded_size() <= memory and (more[0][0] == "diff" or bool(a.loaded_size()) == (memory > 1))
            a.detach()
        call(a)
        freed = a.partially_unload(CPU, a.model_size() // 2)  # ComfyUI frees this much while it is in use
        assert freed > 0 and error(run(a), expected) < 1e-4
        a.partially_load(CPU, 10 * a.model_size())
        assert error(run(a), expected) < 1e-4
        a.detach()
        assert torch.equal(call(q[0]), plain)
        q[0].detach()


def check_lora_on_rows_of_a_stacked_layer():
    """Flux LoRAs with diffusers' names patch thirds of qkv; parts of the input come too."""
    q, d = pair()
    key = next(k for k, w in d[0].model.state_dict().items() if k.endswith("ff.net.2.weight"))
    o, i = d[0].model.state_dict()[key].shape
    adapter = comfy.lora.weight_adapter.lora.LoRAAdapter
    patches = {
        (key, (0, o // 2, o // 4)): adapter(set(), (rand(o // 4, 4), rand(4, i), 4.0, None, None, None)),
        (key, (1, i // 2, i // 4)): adapter(set(), (rand(o, 4), rand(4, i // 4), 2.0, None, None, None)),
    }
    results = []
    for model, _ in (q, d):
        clone = model.clone()
        assert len(clone.add_patches(patches, 0.3)) == 2
        results.append(call(clone))
        clone.detach()
    assert error(*results) < 1e-4 and error(results[0], call(q[0])) > 1e-3
    q[0].detach()


def check_hooks_patch_for_part_of_the_prompt():
    q, d = pair()
    plain, dense = image(*q, steps=3), image(*d, steps=3)
    for kind in ("lora", "lokr"):
        file = lora(*d, kind)
        results = [image(model, hooked(clip, file), steps=3) for model, clip in (q, q, d)]
        assert error(results[0], results[2]) < 1e-4, kind
        assert torch.equal(results[0], results[1]) and error(results[2], dense) > 0.01, kind
        assert torch.equal(image(*q, steps=3), plain), kind


def hooked(clip, file):
    """What the stock nodes Create Hook LoRA and Set CLIP Hooks do."""
    hooks = comfy.hooks.create_hook_lora(lora=file, strength_model=1.0, strength_clip=1.0)
    clip = clip.clone()
    clip.apply_hooks_to_conds = hooks
    clip.patcher.forced_hooks = hooks.clone()
    clip.use_clip_schedule = False
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
    clip.patcher.register_all_hook_patches(hooks, target)
    return clip


def check_functions_of_the_weight():
    q, d = pair()
    key = next(k for k, _ in q[0].quantized())
    results = []
    for model, _ in (q, d):
        clone = model.clone()
        clone.add_weight_wrapper(key, lambda w: 0.5 * w)
        results.append(call(clone))
        clone.detach()
    assert error(*results) < TOLERANCE and error(results[0], call(q[0])) > 1e-3
    q[0].detach()


def check_bypass_lora():
    q, d = pair()
    file = lora(*d, "lora")
    a, b = (comfy.sd.load_bypass_lora_for_models(*p, file, 1.0, 1.0) for p in (q, d))
    assert error(image(*a), image(*b)) < 1e-4


def check_models_merge():
    q, d = pair()
    other = {k: w + 0.05 * rand(*w.shape) for k, w in load_file(FOLDER / "inside-dense.safetensors").items()}
    save_file(
        other, FOLDER / "inside-other.safetensors", read_header(FOLDER / "inside-dense.safetensors")["__metadata__"]
    )
    stranger = native.load(FOLDER / "inside-other.safetensors", [], disable_dynamic=True)

    def merged(first, second):
        clone = first.clone()
        for key, patch in second.get_key_patches("diffusion_model.").items():
            clone.add_patches({key: patch}, 0.3, 0.7)
        return clone

    expected = image(merged(d[0], stranger[0]), d[1])
    assert error(image(merged(q[0], stranger[0]), q[1]), expected) < 1e-4
    expected = image(merged(stranger[0], d[0]), d[1])
    assert error(image(merged(stranger[0], q[0]), q[1]), expected) < 1e-4
    assert error(image(merged(q[0], q[0]), q[1]), image(*q)) < 1e-4


# ------------------------------------------------------------------------------------------------- memory


def check_offload_and_reload_are_exact():
    q, _ = pair()
    plain = call(q[0])
    before = {k: t.clone() for k, t in q[0].model.state_dict().items()}
    for _ in range(3):
        q[0].partially_unload(CPU, q[0].model_size() // 3)
        assert torch.equal(run(q[0]), plain)
        q[0].detach()
        assert torch.equal(call(q[0], 1), plain)
        q[0].detach()
        assert torch.equal(call(q[0]), plain)
    after = q[0].model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def check_two_models_and_two_hundred_runs():
    q, d = pair()
    other, *_ = four_bit.load_file(FOLDER / "inside-4.safetensors", [], "float")
    file = lora(*d, "lora")
    patched, _ = with_lora(q, (file, 1.0))
    cond = q[1].encode_from_tokens_scheduled(q[1].tokenize("a ring"))
    expected, sizes = {}, []
    for i in range(200):
        for n, model in enumerate((q[0], other, patched)):
            made = sample.OneStepSample.execute(model, cond, {"samples": torch.zeros(1, 8, 8, 8)}, 1).args[0]["samples"]
            assert torch.equal(made, expected.setdefault(n, made))
        if i % 20 == 19:
            gc.collect()
            sizes.append(resident())
    assert torch.equal(expected[0], expected[1]) and not torch.equal(expected[0], expected[2])
    assert sizes[-1] - sizes[2] < 2 * 2**20, sizes


def check_saved_files_load_again():
    q, d = pair()
    plain = image(*q)
    loras = [(lora(*d, "lora"), 0.8)], [(lora(*d, "lora"), 0.8), (lora(*d, "lokr", 0.02), 1.0)]
    config = q[0].get_attachment("onestep")
    for patches, packed_layers in ((), True), (loras[0], True), (loras[1], False):
        model, clip = with_lora(q, *patches)
        expected = image(model, clip)
        path = FOLDER / "inside-saved.safetensors"
        comfy.sd.save_checkpoint(str(path), model, clip, None, None, metadata={})
        sd = load_file(path)
        part = {k.removeprefix("model.diffusion_model."): t for k, t in sd.items() if k.startswith("model.")}
        assert (len(weight.layers(part)) == len(list(q[0].quantized()))) == packed_layers
        again = imported("nodes.native.model").build_model(path, config, part, activations="float")
        assert error(image(again, clip), expected) < 1e-4
        assert torch.equal(image(*q), plain)
        text = [k for k in weight.layers(sd) if k.startswith("cond_stage_model.")]
        assert bool(text) == packed_layers


# ------------------------------------------------------------------------------------------------- other models


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
            dense = comfy.sd.load_diffusion_model_state_dict({k: t.clone() for k, t in d.items()}, disable_dynamic=True)
            exact = comfy.sd.load_diffusion_model_state_dict(dict(weights), disable_dynamic=True)
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
    dense = comfy.sd.load_diffusion_model_state_dict(d, disable_dynamic=True)
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
    for fmt in ("int8_tensorwise", "float8_e4m3fn", "nvfp4", "convrot_w4a4"):
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
        exact = comfy.sd.load_diffusion_model_state_dict(dict(sd), disable_dynamic=True)
        assert error(found, velocity(exact, inputs)) < 0.5, fmt
        if fmt != "nvfp4":  # there ComfyUI itself takes the packed width of a layer for the model's
            theirs = comfy.sd.load_diffusion_model_state_dict(dict(stock), disable_dynamic=True)
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
    model = model_of(file)
    exact = comfy.sd.load_diffusion_model_state_dict(dict(sd), disable_dynamic=True)
    assert 1e-4 < error(velocity(model, inputs), velocity(exact, inputs)) < 0.1
    assert model.model_size() < 0.5 * exact.model_size()


def check_a_dense_file_loads_as_it_is():
    sd, inputs = transformer("sd3")
    model = model_of(sd)
    dense = comfy.sd.load_diffusion_model_state_dict(dict(sd), disable_dynamic=True)
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


def main() -> None:
    results = {}
    for name, function in list(globals().items()):
        if name.startswith("check_") and ONLY in name:
            start = time.time()
            try:
                function()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
            mm.unload_all_models()
            print(f"{name}: {time.time() - start:.1f} s {'' if not results[name] else results[name]}", flush=True)
    OUT.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
