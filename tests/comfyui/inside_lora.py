"""Checks of inside.py: what changes weights (LoRAs, hooks, merging) does to 4 bits what it does to dense."""

import comfy.hooks
import comfy.lora
import comfy.model_management as mm
import comfy.sd
import torch
from inside_helpers import (
    CPU,
    FOLDER,
    TOLERANCE,
    call,
    error,
    image,
    lora,
    native,
    pair,
    rand,
    read_header,
    run,
    with_lora,
)
from safetensors.torch import load_file, save_file


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
