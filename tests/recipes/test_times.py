"""Timesteps and steps of the recipes against diffusers' schedulers, and against the sources' own lists."""

import numpy as np
import pytest
import torch

from distill.recipes.recipe import find, of_file, recipes
from distill.recipes.steps import DOWN
from distill.recipes.times import RULES

diffusers = pytest.importorskip("diffusers")
TABLE = recipes()
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "trailing": diffusers.EulerDiscreteScheduler(**LATENT, timestep_spacing="trailing"),
    "consistency": diffusers.LCMScheduler(**LATENT),
    "shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("rule", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8])
def test_rules_are_diffusers_own(rule, steps):
    scheduler = SCHEDULERS[rule]
    scheduler.set_timesteps(steps)
    found = RULES[rule](steps, {"shift": 3.0} if rule == "shifted" else {})
    np.testing.assert_allclose(found, scheduler.timesteps, rtol=1e-5)


def test_even_flow_is_flux_s():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4))
    np.testing.assert_allclose(TABLE["flux-schnell"].timesteps(4), scheduler.timesteps)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_angles_are_those_of_scm(steps):
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(steps, max_timesteps=1.5708, intermediate_timesteps=1.3 if steps == 2 else None)
    a = scheduler.timesteps[:-1].double()
    expected = 1000 * a.sin() / (a.sin() + a.cos())
    np.testing.assert_allclose(TABLE["sana-sprint"].timesteps(steps), expected, rtol=1e-6)


def test_the_lists_of_the_cards():
    said = {
        "dmd2-sdxl-1step": [399], "dmd2-sdxl": [999, 749, 499, 249], "hyper-sdxl-1step": [800], "swiftbrush": [999],
        "pixart-dmd": [400], "hyper-sd15-unified": [999], "sdxl-lightning-1step": [999], "instaflow": [1000],
    }  # fmt: skip
    assert {name: TABLE[name].timesteps(TABLE[name].steps) for name in said} == said


def test_every_recipe_is_whole():
    for r in TABLE.values():
        assert r.takes(r.steps) and r.step in DOWN and r.noise in ("unit", "sigma"), r.name
        assert r.negative and r.licence and r.sources and r.link.startswith("https://huggingface.co/"), r.name
        assert r.weights in ("full", "LoRA", "full or LoRA") and r.pixels in (512, 1024), r.name
        for steps in (n for n in range(1, 51) if r.takes(n)):
            times = r.timesteps(steps)
            assert len(times) == steps and times == sorted(times, reverse=True) and times[-1] > 0, r.name


def test_steps_it_was_not_made_for_are_refused():
    with pytest.raises(ValueError, match=r"SDXL-Lightning takes 2, 4, 8 steps, not 6\."):
        TABLE["sdxl-lightning"].timesteps(6)
    with pytest.raises(ValueError, match=r"SD-Turbo takes 1 to 4 steps, not 5\."):
        TABLE["sd-turbo"].timesteps(5)
    assert [TABLE["tcd-sdxl"].takes(n) for n in (1, 3, 4, 50)] == [False, False, True, True]  # diffusers' guide to it


def test_licences_where_a_card_and_its_repository_say_different_things():
    """Both are said: the stricter one forbids what the other allows."""
    for name in ("dmd2-sdxl-1step", "dmd2-sdxl", "swiftbrush"):
        assert {"CC BY-NC 4.0", "CC BY-NC-SA 4.0"} == {part.split(" (")[0] for part in TABLE[name].licence.split(", ")}
    for name in ("instaflow", "two-rectified-flow"):  # "also subject to" the base model's
        assert "CC BY-NC 4.0 and CreativeML OpenRAIL-M" in TABLE[name].licence


FILES = {
    "sd_turbo.safetensors": ("sd-turbo", 1),
    "sd_xl_turbo_1.0_fp16.safetensors": ("sdxl-turbo", 1),
    "sdxl_lightning_1step_x0.safetensors": ("sdxl-lightning-1step", 1),
    "SDXL Lightning 1-step.safetensors": ("sdxl-lightning-1step", 1),
    "SDXL-Lightning/sdxl_lightning_2step_lora.safetensors": ("sdxl-lightning", 2),
    "juggernautXL_v9Rdphoto2Lightning.safetensors": ("sdxl-lightning", 4),
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors": ("hyper-sdxl-1step", 1),
    "Hyper-SDXL-1step-lora.safetensors": ("hyper-sdxl-unified", 1),
    "Hyper-SDXL-8steps-lora.safetensors": ("hyper-sdxl", 8),
    "Hyper-SDXL-8steps-CFG-lora.safetensors": ("hyper-sdxl-cfg", 8),
    "Hyper-SD15-12steps-CFG-lora.safetensors": ("hyper-sd15-cfg", 12),
    "Hyper-SD15-2steps-lora.safetensors": ("hyper-sd15", 2),
    "dmd2_sdxl_1step_unet_fp16.bin": ("dmd2-sdxl-1step", 1),
    "dmd2_sdxl_4step_lora_fp16.safetensors": ("dmd2-sdxl", 4),
    "lcm-lora-sdxl.safetensors": ("lcm-sdxl", 4),
    "TCD/SDXL/pytorch_lora_weights.safetensors": ("tcd-sdxl", 4),
    "PixArt-Alpha-DMD-XL-2-512x512.safetensors": ("pixart-dmd", 1),
    "sd3.5_large_turbo-Q4_0.gguf": ("sd35-large-turbo", 4),
    "flux1-schnell-fp8.safetensors": ("flux-schnell", 4),
    "Sana_Sprint_1.6B_1024px.pth": ("sana-sprint", 2),
    "instaflow_0_9B.safetensors": ("instaflow", 1),
}


@pytest.mark.parametrize("file", FILES)
def test_files_tell_their_recipe(file):
    found, name, steps = find([file])
    assert (found.name, steps, name) == (*FILES[file], file)


def test_the_nearest_file_tells_and_the_architecture_chooses():
    names = ["styles/ink.safetensors", "lcm_lora.safetensors", "sdxl_lightning_4step.safetensors"]
    assert [find(names, base)[0].name for base in ("SDXL", "SD15")] == ["lcm-sdxl", "lcm-sd15"]
    assert find(["v1-5-pruned.safetensors", "turbo.safetensors"]) is None
    assert find(["dmd2_sdxl_4step.safetensors"], "SD15") is None  # it cannot be that
    assert find(["unknown.safetensors"], "FluxSchnell")[0].name == "flux-schnell"  # no guidance input: it is no other
    assert find([], "Flux") is None


def test_a_file_of_ours_says_its_own(tmp_path):
    import tiny

    from distill.file.metadata import read_metadata
    from distill.schedule import from_spec

    for options in ({"t_in": 399, "prediction": "eps", "steps": 3}, {"schedule": tiny.FLOW, "prediction": "flow"}):
        meta = read_metadata(tiny.write(tmp_path / "a.safetensors", **{"t_in": 1000} | options))
        r, schedule = of_file(meta), from_spec(meta.schedule)
        assert (r.step, r.steps, r.timesteps(1), r.guidance) == ("renoise", meta.steps, [meta.t_in], 1)
        t = torch.tensor(schedule.time(meta.t_in), dtype=torch.float64)
        level = schedule.sigma(t) if schedule.name == "flow" else schedule.sigma(t) / schedule.alpha(t)
        assert r.sigma(meta.t_in) == pytest.approx(float(level))
    few = read_metadata(tiny.write(tmp_path / "f.safetensors", steps=2, times=[999, 200]))
    assert [of_file(few).timesteps(n) for n in (1, 2, 4)] == [[999], [999, 200], [999, 749, 500, 250]]
    teacher = tiny.write(tmp_path / "t.safetensors", method="teacher", steps=5, guidance={"scale": 2.0})
    r = of_file(read_metadata(teacher))
    assert (r.step, r.guidance, r.timesteps(5)) == ("euler", 2.0, [999, 799, 599, 400, 200])
