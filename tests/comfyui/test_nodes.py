"""The nodes inside a real ComfyUI, against diffusers and the library on the same files."""

import json
import os
import subprocess
import tomllib

import numpy as np
import pytest
import tiny
import torch
from conftest import MODELS
from graphs import PROMPT, SEED, ksampler, one_step, scheduled
from safetensors.torch import save_file
from server import PACK, environment, node

from distill import bundled, denoiser, load, sample, schedule
from distill.file.metadata import read_metadata


def latent_of(client, graph: dict) -> torch.Tensor:
    run = client.run(graph)
    assert not run.errors, run.errors
    return client.latent(run.outputs["save"]["latents"][0])


def library(path, mods=None):
    """The same file through diffusers -> (Denoiser, cond of PROMPT, cond of the null prompt, noise, t_in)."""
    meta, mods = read_metadata(path), mods or tiny.build(path)
    levels = schedule.from_spec(meta.schedule)
    d = denoiser.from_net(denoiser.diffusers_net(mods.unet), levels, meta.prediction)
    conds = [{k: v.expand(2, *v.shape[1:]) for k, v in tiny.encode(mods, [p]).items()} for p in (PROMPT, "")]
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(SEED))
    return d, *conds, noise, float(levels.time(meta.t_in))


def close(a, b, tolerance: float = 1e-4):
    assert a.shape == b.shape and b.std() > 0.1
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# ------------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize("file", [f for f in MODELS if f != "latent.safetensors"])
@torch.no_grad()
def test_same_noise_same_latent_as_the_library(client, folder, file):
    d, cond, _, noise, t_in = library(folder / file)
    close(latent_of(client, one_step(file, steps=1)), sample.one_step(d, t_in)(noise, cond))


@torch.no_grad()
def test_latent_scale_and_shift_of_the_file(client, folder):
    d, cond, _, noise, t_in = library(folder / "latent.safetensors")
    expected = sample.one_step(d, t_in)(noise, cond) / 0.5 + 0.1
    close(latent_of(client, one_step("latent.safetensors")), expected)


def test_what_a_mask_protects_stays(client):
    """A latent goes through the file's scale and shift on its way in and back again."""
    graph = one_step("latent.safetensors") | {
        "mask": node("SolidMask", value=0.0, width=64, height=64),
        "masked": node("SetLatentNoiseMask", samples=["sample", 0], mask=["mask", 0]),
        "again": node(
            "OneStepSample", model=["load", 0], positive=["negative", 0], latent=["masked", 0], seed=SEED + 1
        ),
        "kept": node("SaveLatent", samples=["again", 0], filename_prefix="latents/kept"),
    }
    run = client.run(graph)
    close(*(client.latent(run.outputs[k]["latents"][0]) for k in ("kept", "save")), 1e-5)


@pytest.mark.parametrize("file", ["student.safetensors", "eps-399.safetensors", "flow-750.safetensors"])
def test_stock_sampler_with_our_schedule_gives_the_same(client, file):
    guider = node("BasicGuider", model=["load", 0], conditioning=["positive", 0])
    close(latent_of(client, scheduled(file, guider)), latent_of(client, one_step(file)), 1e-6)


@torch.no_grad()
def test_teacher_with_our_schedule_is_the_library_s_solver(client, folder):
    cfg = node("CFGGuider", model=["load", 0], positive=["positive", 0], negative=["negative", 0], cfg=2.0)
    d, cond, null, noise, _ = library(folder / "teacher.safetensors")
    expected = sample.solve(denoiser.guided(d, 2.0, null), noise, cond, solver="ddim", steps=5)
    close(latent_of(client, scheduled("teacher.safetensors", cfg)), expected)


def test_teacher_with_stock_ksampler(client, folder):
    """Nothing of ours samples here: the file is an ordinary model, and 5 simple steps of Euler are DDIM's."""
    d, cond, null, noise, _ = library(folder / "teacher.safetensors")
    times = [i / 999 for i in (999, 799, 599, 399, 199)]
    expected = sample.solve(denoiser.guided(d, 2.0, null), noise, cond, solver="ddim", times=times)
    close(latent_of(client, ksampler("teacher.safetensors", steps=5, cfg=2.0)), expected)


def test_student_of_the_last_timestep_with_stock_ksampler(client):
    """What the workflow's note says. (A student of another timestep needs our sampler or our schedule.)"""
    close(
        latent_of(client, ksampler("student.safetensors", 1, 1.0)), latent_of(client, one_step("student.safetensors"))
    )


def test_the_largest_seed_is_a_seed(client):
    assert latent_of(client, one_step("student.safetensors", seed=2**64 - 1)).isfinite().all()


def test_a_student_of_several_steps_takes_them(client):
    guider = node("BasicGuider", model=["load", 0], conditioning=["positive", 0])
    run = client.run(scheduled("few-steps.safetensors", guider))
    assert not run.errors and [e for e in run.events if e[0] == "progress"][-1]
    again = latent_of(client, scheduled("few-steps.safetensors", guider, seed=8))
    own, once = (latent_of(client, one_step("few-steps.safetensors", seed=8, steps=steps)) for steps in (0, 1))
    assert (again - own).abs().max() < 1e-4 and (again - once).abs().max() > 0.01


@pytest.mark.parametrize("file", ["student.safetensors", "kl.safetensors"])
@torch.no_grad()
def test_vae_decodes_and_encodes_as_the_library_s(client, folder, file):
    graph = one_step(file) | {
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "image": node("PreviewImage", images=["decode", 0]),
        "encode": node("VAEEncode", pixels=["decode", 0], vae=["load", 2]),
        "again": node("SaveLatent", samples=["encode", 0], filename_prefix="latents/encoded"),
    }
    run = client.run(graph)
    mods = tiny.build(folder / file)
    latent, encoded = (client.latent(run.outputs[k]["latents"][0]) for k in ("save", "again"))
    images = tiny.decode(mods, latent)
    for reference, image in zip(run.outputs["image"]["images"], images, strict=True):
        pixels = torch.from_numpy(np.array(client.image(reference).convert("RGB"), np.float32))
        assert (pixels - 127.5 * (image.permute(1, 2, 0) + 1)).abs().max() <= 1.01  # 8 bits
    if file == "student.safetensors":
        return close(encoded, mods.vae.encode(images))
    posterior = mods.vae.encode(images).latent_dist  # ComfyUI draws from it
    assert ((encoded - posterior.mean).abs() < 6 * posterior.std + 1e-3).all()


# ------------------------------------------------------------------------------------------------ patches


def kohya_lora(mods, path):
    """A random LoRA with kohya's names on some layers of every kind; returns the modules with it merged."""
    generator, lora = torch.Generator().manual_seed(1), {}
    for prefix, module in (("lora_unet", mods.unet), ("lora_te", mods.text_encoder)):
        for name, layer in list(module.named_modules()):
            if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) or "class_embedding" in name:
                continue
            name = name if prefix == "lora_unet" or name.startswith("text_model.") else f"text_model.{name}"
            inner = (layer.weight.shape[1], *layer.weight.shape[2:])
            down = 0.1 * torch.randn(4, *inner, generator=generator)
            up = 0.1 * torch.randn(layer.weight.shape[0], 4, *[1] * (len(inner) - 1), generator=generator)
            key = f"{prefix}_{name.replace('.', '_')}"
            lora |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
            with torch.no_grad():
                layer.weight += 2.0 / 4 * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    save_file(lora, path)
    return mods, len(lora) // 3


@torch.no_grad()
def test_stock_lora_loader_patches_every_layer(client, server, folder):
    merged, layers = kohya_lora(tiny.build(folder / "student.safetensors"), server.base / "models/loras/l.safetensors")
    assert layers > 60
    graph = one_step("student.safetensors", model=("lora", 0))
    graph["lora"] = node(
        "LoraLoader",
        model=["load", 0],
        clip=["load", 1],
        lora_name="l.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    graph["positive"]["inputs"]["clip"] = ["lora", 1]
    d, cond, _, noise, t_in = library(folder / "student.safetensors", merged)
    close(latent_of(client, graph), sample.one_step(d, t_in)(noise, cond))
    assert "lora key not loaded" not in server.log
    plain, *_ = library(folder / "student.safetensors")
    assert (sample.one_step(d, t_in)(noise, cond) - sample.one_step(plain, t_in)(noise, cond)).abs().max() > 0.1


def test_self_attention_guidance_works(client):
    """It wants a second prediction, which KSampler takes from a negative prompt and OneStep Sample from the prompt."""
    sag = {"sag": node("SelfAttentionGuidance", model=["load", 0], scale=0.7, blur_sigma=2.0)}
    found = latent_of(client, one_step("student.safetensors", model=("sag", 0)) | sag)
    expected = ksampler("student.safetensors", 1, 1.0) | sag
    expected["sample"]["inputs"] |= {"model": ["sag", 0], "negative": ["positive", 0]}
    close(found, latent_of(client, expected))
    assert (found - latent_of(client, one_step("student.safetensors"))).abs().max() > 1e-3


def test_comfyui_can_load_the_weights_again(client):
    """As it does for a second GPU, and for hooks that patch the MODEL during part of the prompt."""
    graph = one_step("student.safetensors", model=("again", 0))
    graph["again"] = node("TestReloaded", model=["load", 0])
    close(latent_of(client, graph), latent_of(client, one_step("student.safetensors")), 1e-6)


def test_prompt_weights_work(client):
    """`(word:1.5)` is ComfyUI's own syntax; the tokenizer and the encoder must follow it."""
    graph = one_step("student.safetensors")
    graph["positive"]["inputs"]["text"] = "a small (red:1.5) ring"
    assert (latent_of(client, graph) - latent_of(client, one_step("student.safetensors"))).abs().max() > 1e-3


def test_a_textual_inversion_that_is_a_word_s_own_vector_is_that_word(server, client):
    student = load(bundled("student"))
    red = student.meta.text_encoder["tokenizer"]["model"]["vocab"]["red"]
    vector = student.parts["text_encoder"].get_input_embeddings().weight[red : red + 1].detach().clone()
    (server.base / "models/embeddings").mkdir(exist_ok=True)
    save_file({"emb_params": vector}, server.base / "models/embeddings/scarlet.safetensors")
    drawn = []
    for word in ("red", "embedding:scarlet", "embedding:nowhere"):
        graph = one_step("bundled: student")
        graph["positive"]["inputs"]["text"] = f"a small {word} ring"
        drawn.append(latent_of(client, graph))
    close(drawn[1], drawn[0])
    assert (drawn[2] - drawn[0]).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------ manners


def test_progress_and_preview_reach_the_page(client):
    run = client.run(one_step("student.safetensors", seed=99))
    assert ("progress", "sample") in run.events
    assert any(kind == "preview" for kind, _ in run.events)


def test_cancel_stops_before_the_network_is_called(client):
    graph = one_step("student.safetensors", model=("cancelled", 0))
    graph["cancelled"] = node("TestCancelled", model=["load", 0])
    run = client.run(graph)
    assert not run.errors and run.events[-1][0] == "execution_interrupted"


def test_schemas_help_and_search(server):
    info = server.json("/object_info")
    ours = {k: v for k, v in info.items() if v["python_module"].endswith("onestep-nodes")}
    loaders = {"OneStepLoadStudent", "OneStepLoad4Bit", "OneStepLoad4BitCLIP"}
    sampling = {"OneStepSample", "OneStepRecipe", "OneStepSchedule", "OneStepNegative"}
    others = sampling | {"OneStepQuantize", "OneStepSaveStudent"}
    others |= {"OneStepTrainStudent", "OneStepCompare", "OneStepBenchmark"}
    assert ours.keys() == loaders | others
    for name, schema in ours.items():
        inputs = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
        assert all(options.get("tooltip") for _, options in inputs.values()), name
        assert all(schema["output_tooltips"]) and schema["description"] and schema["search_aliases"], name
        page = server.get(f"/extensions/onestep-nodes/docs/{name}.md").decode()
        assert page.startswith("# ") and all(f"`{i}`" in page for i in inputs), name
        assert not any(line.startswith("|") for line in page.splitlines()), f"{name}: the panel cuts tables"
    files = ours["OneStepLoadStudent"]["input"]["required"]["file"][1]["options"]
    assert files[:2] == ["bundled: student", "bundled: teacher"] and "student.safetensors" in files


PROBE = """
import sys, time
sys.argv = ["main.py", "--cpu", "--base-directory", sys.argv[2]]
pack = {pack!r}
sys.path.insert(0, ".")
import comfy.options; comfy.options.enable_args_parsing()
import nodes, comfy_api.latest, asyncio, importlib.util
before = set(sys.modules)
start = time.process_time()  # a busy machine must not count
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py", submodule_search_locations=[pack])
module = importlib.util.module_from_spec(spec); sys.modules["pack"] = module; spec.loader.exec_module(module)
classes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
print("SECONDS", time.process_time() - start)
print("NEW", *sorted(m for m in set(sys.modules) - before if not m.startswith("pack") and "." not in m))
print("OPTIONS", *classes[0].define_schema().inputs[0].options, sep="|")
"""


def test_import_is_quick_and_needs_no_model_folders(comfyui, tmp_path):
    command = [comfyui[1], "-c", PROBE.format(pack=str(PACK)), "main.py", str(tmp_path)]
    out = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=300)
    lines = {line.split(maxsplit=1)[0].split("|")[0]: line for line in out.stdout.splitlines() if line.strip()}
    assert "SECONDS" in lines, out.stderr[-3000:]
    assert float(lines["SECONDS"].split()[1]) < 0.1
    assert not {"diffusers", "peft", "accelerate", "matplotlib", "tyro"} & set(lines["NEW"].split())
    assert lines["OPTIONS"] == "OPTIONS|bundled: student|bundled: teacher"


OLD = """
import asyncio, sys, types
sys.argv = ["main.py", "--cpu", "--base-directory", sys.argv[2]]
sys.path.insert(0, ".")
import comfy.options; comfy.options.enable_args_parsing()
import nodes
sys.modules["comfyui_version"] = types.SimpleNamespace(__version__={version!r}, __spec__=sys.modules["nodes"].__spec__)
print("LOADED", asyncio.run(nodes.load_custom_node({pack!r}, set())))
"""


@pytest.mark.parametrize("version", ["0.3.64", "0.11.1"])
def test_a_comfyui_too_old_is_told_so_in_one_line(comfyui, tmp_path, version):
    command = [comfyui[1], "-c", OLD.format(pack=str(PACK), version=version), "main.py", str(tmp_path)]
    out = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=300)
    assert "LOADED True" in out.stdout, out.stderr[-3000:]
    oldest = tomllib.loads((PACK / "pyproject.toml").read_text())["tool"]["comfy"]["requires-comfyui"].strip(">=")
    assert out.stderr.count(f"OneStep needs ComfyUI {oldest} or later, and this is {version}: update ComfyUI.") == 1
    assert "Traceback" not in out.stderr


def test_a_file_written_again_is_loaded_again(client, folder):
    tiny.write(folder / "again.safetensors", seed=1)
    first = latent_of(client, one_step("again.safetensors"))
    tiny.write(folder / "again.safetensors", seed=2)
    os.utime(folder / "again.safetensors", (1, 1))
    assert (latent_of(client, one_step("again.safetensors")) - first).abs().max() > 0.01


def test_time_in_our_nodes_is_at_most_a_tenth_of_the_image_s(comfyui):
    """And all that OneStepSample spends beside the network is not above stock KSampler's on the same MODEL."""
    script = [comfyui[1], str(PACK / "benchmarks/node_overhead.py"), "--threads=1", "--runs=10"]
    variables = environment() | {"COMFYUI_PATH": str(comfyui[0])}
    out = subprocess.run(script, env=variables, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    result = json.loads(out.stdout[out.stdout.index("{") :])
    assert result["ours"] <= 0.1 and result["ms"]["sampling"] < 1.1 * result["ms"]["stock"], result
