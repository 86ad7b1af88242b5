"""OneStepTrainStudent on a teacher of one's own: a diffusers folder and prompts, through ComfyUI's API."""

import graphs
import pytest
import tiny
from safetensors.torch import load_file
from server import node

from distill.backbones import load
from distill.file.metadata import read_metadata

PROMPTS = "a red ring\n\n  a blue square  \n"


def training(source, **changes) -> dict:
    """The node on a folder, and its outputs used at once: a latent and a picture."""
    inputs = {"teacher": "bundled: teacher", "minutes": 0.05, "name": "own", "training_seed": 0, "batch_size": 2}
    inputs |= {"folder": str(source), "prompts": PROMPTS} | changes
    parts = graphs.one_step("") | {"train": node("OneStepTrainStudent", **inputs)}
    del parts["load"]
    for name, output in (("positive", 1), ("negative", 1)):
        parts[name]["inputs"]["clip"] = ["train", output]
    parts["sample"]["inputs"]["model"] = ["train", 0]
    parts["decode"] = node("VAEDecode", samples=["sample", 0], vae=["train", 2])
    return parts | {"show": node("PreviewImage", images=["decode", 0])}


def teacher(folder, beta_schedule="scaled_linear"):
    """A tiny Stable Diffusion 2.x: it predicts v, as a random eps in pure noise is a latent too loud to train on."""
    return tiny.stable_diffusion(folder, prediction="v_prediction", clip=True, beta_schedule=beta_schedule)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return teacher(tmp_path_factory.mktemp("own") / "teacher")


def test_a_folder_becomes_a_student_that_opens_and_draws(client, folder, source):
    run, file = client.run(training(source)), folder / "own.safetensors"
    assert not run.errors, run.errors
    try:
        assert run.outputs["train"]["text"][0].startswith("own.safetensors: ")
        assert client.image(run.outputs["show"]["images"][0]).size == (64, 64)
        again = client.run(graphs.one_step(file.name))
        assert not again.errors, again.errors
        first, second = (client.latent(r.outputs["save"]["latents"][0]) for r in (run, again))
        assert first.isfinite().all() and first.std() > 0.01 and (first - second).abs().max() < 1e-5
        meta, ours = read_metadata(file), load(source)
        assert (meta.family, meta.method, meta.steps) == ("stable_diffusion", "vsd", 1)
        assert (meta.prediction, meta.schedule) == (ours.meta.prediction, ours.meta.schedule)
        trained, before = load(file).net.state_dict(), ours.net.state_dict()
        moved = [k for k, v in before.items() if not trained[k].equal(v.half().float())]  # files hold halves
        assert len(moved) > len(before) / 2, moved
        assert all(v.isfinite().all() for v in load_file(file).values())
    finally:
        file.unlink()


def test_a_folder_without_prompts_is_told_what_it_lacks(client, folder, source):
    before = set(folder.iterdir())
    run = client.run(training(source, prompts=" \n"))
    assert "teacher is not of the tutorial's world: write prompts to train on" in run.errors["train"]
    assert set(folder.iterdir()) == before


def test_a_folder_whose_student_comfyui_could_not_open_is_refused_before_it_trains(client, folder, tmp_path):
    before, linear = set(folder.iterdir()), teacher(tmp_path / "linear", "linear")
    said = client.run(training(linear)).errors["train"]
    assert said.startswith(f"{linear}: ") and "needs beta_schedule = 'scaled_linear', the file has 'linear'" in said
    assert set(folder.iterdir()) == before
