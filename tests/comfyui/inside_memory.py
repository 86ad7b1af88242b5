"""Checks of inside.py: a OneStep file in 4 bits, what it takes of memory, offloaded, run for long and saved."""

import gc
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from inside_helpers import (
    CPU,
    FOLDER,
    STATIC,
    TOLERANCE,
    call,
    error,
    four_bit,
    image,
    lora,
    native,
    pair,
    run,
    sample,
    weight,
    with_lora,
)
from inside_setup import imported
from safetensors.torch import load_file


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024


def check_the_same_numbers_as_the_dense_file():
    q, d = pair()
    assert len(list(q[0].quantized())) > 60 and len(list(q[1].patcher.quantized())) >= 12
    assert error(image(*q), image(*d)) < TOLERANCE
    if not STATIC:  # ComfyUI 0.12 cannot load again
        return
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
        imported("nodes.recipe").attach(again, config, torch.float32)
        assert error(image(again, clip), expected) < 1e-4
        assert torch.equal(image(*q), plain)
        text = [k for k in weight.layers(sd) if k.startswith("cond_stage_model.")]
        assert bool(text) == (packed_layers or not hasattr(ModelPatcher, "model_state_dict_for_saving"))
