"""OneStepRecipe and OneStepSample through ComfyUI's API: which recipe they take, and what they say."""

import pytest
import torch
from graphs import SEED, load, one_step, save, scheduled
from safetensors.torch import save_file
from server import node

from distill.header import read_header


@pytest.fixture(scope="module")
def files(server, folder):
    """Two LoRAs whose only word about themselves is their name, and a student in a file for ComfyUI's own loaders."""
    for name in ("sdxl_lightning_2step_lora", "ink_lora"):
        save_file({}, server.base / f"models/loras/{name}.safetensors")
    said = read_header(folder / "foreign.safetensors")["__metadata__"] | {"t_in": "399", "steps": "2"}
    del said["onestep.version"]
    save_file({}, folder / "exported.safetensors", said)


def stranger(file: str, loras: dict[str, float] | None = None, **recipe) -> dict:
    """A MODEL from another loader of a file of that name, through LoRAs (file -> strength), into our nodes."""
    graph, last = load("foreign.safetensors") | {"other": node("TestForeign", file=f"{file}.safetensors")}, "other"
    for name, strength in (loras or {}).items():
        graph[name] = node("LoraLoaderModelOnly", model=[last, 0], lora_name=name, strength_model=strength)
        last = name
    direct = {"model": [last, 0], "positive": ["positive", 0], "latent": ["empty", 0], "seed": SEED}
    parts = {"noise": ["noise", 0], "guider": ["guider", 0], "latent_image": ["empty", 0]}
    return (
        graph
        | {
            "recipe": node("OneStepRecipe", model=[last, 0], **recipe),
            "noise": node("RandomNoise", noise_seed=SEED),
            "guider": node("BasicGuider", model=["recipe", 0], conditioning=["positive", 0]),
            "custom": node("SamplerCustomAdvanced", sampler=["recipe", 1], sigmas=["recipe", 2], **parts),
            "sample": node("OneStepSample", **direct, **recipe),
            "saved": node("SaveLatent", samples=["custom", 0], filename_prefix="latents/recipe"),
        }
        | save()
    )


@pytest.mark.parametrize(
    ("file", "loras", "recipe", "told"),
    [
        ("dmd2_sdxl_4step_unet", {}, {}, "DMD2 SDXL, 4 steps (told by dmd2_sdxl_4step_unet.safetensors): 4"),
        ("nameless", {"sdxl_lightning_2step_lora.safetensors": 1.0, "ink_lora.safetensors": 0.8}, {},
         "SDXL-Lightning (told by sdxl_lightning_2step_lora.safetensors): 2 steps at 999, 499;"),
        ("dmd2_sdxl_4step_unet", {"sdxl_lightning_2step_lora.safetensors": 0.0}, {}, "DMD2 SDXL, 4 steps (told by"),
        ("nameless", {}, {"family": "dmd2-sdxl-1step"}, "DMD2 SDXL, 1 step (chosen): 1 step at 399; CFG 1."),
        ("sdxl_lightning_8step", {}, {"family": "sdxl-lightning"}, "SDXL-Lightning (chosen): 8 steps at 999, 874,"),
        ("exported", {}, {}, "OneStep file (vsd) (told by exported.safetensors): 2 steps at 399, 200; CFG 1."),
        ("sdxl_lightning_8step", {}, {"steps": 4}, "SDXL-Lightning (told by sdxl_lightning_8step.safetensors): 4 s"),
    ],
)  # fmt: skip
def test_the_recipe_is_told_and_both_nodes_take_it(client, files, file, loras, recipe, told):
    run = client.run(stranger(file, loras, **recipe))
    assert not run.errors, run.errors
    assert run.outputs["recipe"]["text"][0].startswith(told)
    assert ("preview", "recipe") in run.events  # the text, for the page
    custom, one = (client.latent(run.outputs[k]["latents"][0]) for k in ("saved", "save"))
    assert torch.equal(custom, one) and custom.isfinite().all() and custom.std() > 0.1


def test_a_file_of_ours_says_its_own(client):
    graph = scheduled("few-steps.safetensors", node("BasicGuider", model=["load", 0], conditioning=["positive", 0]))
    expected = client.run(graph)
    graph["schedule"] = node("OneStepRecipe", model=["load", 0])
    graph["sample"]["inputs"] |= {"sampler": ["schedule", 1], "sigmas": ["schedule", 2]}
    found = client.run(graph)
    latents = [client.latent(run.outputs["save"]["latents"][0]) for run in (found, expected)]
    assert torch.equal(*latents)
    assert found.outputs["schedule"]["text"][0].startswith("OneStep file (vsd) (what its file says): 4 steps at 999,")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({}, "This MODEL has no OneStep recipe. The files it comes from are nameless.safetensors. Choose its family"),
        ({"family": "sdxl-lightning", "steps": 6}, "SDXL-Lightning takes 2, 4, 8 steps, not 6."),
        (
            {"family": "flux-schnell"},
            "This MODEL is no flow model, and FLUX.1 schnell is the other kind. Choose the fam",
        ),
    ],
)
def test_what_cannot_be_is_refused(client, files, recipe, said):
    run = client.run(stranger("nameless", **recipe))
    assert said in run.errors[next(iter(run.errors))]


def test_guidance_is_not_left_out_in_silence(client, files):
    ours = one_step("few-steps.safetensors")
    ours["sample"]["inputs"]["family"] = "hyper-sdxl-cfg"
    for graph in (stranger("nameless", family="hyper-sdxl-cfg"), ours):
        said = client.run(graph).errors["sample"]
        assert "Hyper-SD SDXL, guidance kept wants guidance (CFG 5)" in said and "CFGGuider" in said
