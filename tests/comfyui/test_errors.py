"""What a user is told when a file, a MODEL or a prompt is wrong: what it is, and the cure."""

import json

import pytest
import tiny
from graphs import one_step
from safetensors.torch import load_file, save_file
from server import node

from distill.header import read_header


@pytest.fixture(scope="session")
def broken(server, folder):
    """Files that are wrong in one way each, in models/checkpoints."""
    target = server.base / "models/checkpoints"
    sound = (folder / "student.safetensors").read_bytes()
    strings = read_header(folder / "student.safetensors")["__metadata__"]
    weights = load_file(folder / "student.safetensors")
    configs = json.loads(strings["architecture"])

    def architecture(part, **changes):
        return {"architecture": json.dumps(configs | {part: configs[part] | changes})}

    (target / "cut.safetensors").write_bytes(sound[: len(sound) // 2])
    (target / "page.safetensors").write_bytes(b"<!DOCTYPE html><title>404</title>" * 9)
    variants = {
        "stranger": {"onestep.version": None},
        "newer": {"onestep.version": "2"},
        "score": {"prediction": "score"},
        "wider": architecture("unet", block_out_channels=[64, 128]),
        "groups": architecture("unet", norm_num_groups=16),
        "gelu": architecture("unet", act_fn="gelu"),
        "deeper": architecture("vae", depth=4),
        "words": architecture("text_encoder", vocab_size=99),
    }
    for name, changes in variants.items():
        changed = {k: v for k, v in (strings | changes).items() if v is not None}
        save_file(weights, target / f"{name}.safetensors", changed)
    return target


@pytest.mark.parametrize(
    ("file", "problem", "cure"),
    [
        ("absent", "no such file", "choose another"),
        ("cut", "truncated", "Download it again"),
        ("page", "not a safetensors file", "as safetensors"),
        ("stranger", "not a OneStep file", "own loaders"),
        ("newer", "newer OneStep", "Update"),
        ("score", "'score'", "make it again"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(client, broken, file, problem, cure):
    run = client.run(one_step(f"{file}.safetensors"))
    message = run.errors["load"].splitlines()[0]
    assert not run.events and f"{file}.safetensors" in message and problem in message and cure in message


@pytest.mark.parametrize(
    ("file", "problem", "cure"),
    [
        ("wider", "the U-Net's", "make it again"),
        ("deeper", "the VAE lacks", "make it again"),
        ("words", "the CLIP's", "make it again"),
        ("groups", "norm_num_groups = 32", "Train with that setting"),
        ("gelu", "act_fn = 'silu'", "distill sample"),
    ],
)
def test_a_wrong_architecture_names_the_weight_or_the_setting(client, broken, file, problem, cure):
    run = client.run(one_step(f"{file}.safetensors"))
    message = run.errors["load"].splitlines()[0]
    assert f"{file}.safetensors: wrong architecture" in message and problem in message and cure in message


def test_a_model_of_another_loader_is_told_which_loader(client):
    graph = one_step("student.safetensors", model=("stranger", 0))
    graph["stranger"] = node("TestForeign", file="nameless")
    assert "OneStep Load Student" in client.run(graph).errors["sample"].splitlines()[0]


def test_a_prompt_of_another_clip_is_told_which_clip(client, folder):
    other = {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 64}
    tiny.write(folder / "other.safetensors", text={"hidden_size": 64}, unet=other)
    graph = one_step("student.safetensors")
    graph["other"] = node("OneStepLoadStudent", file="other.safetensors")
    graph["positive"]["inputs"]["clip"] = ["other", 1]
    assert "CLIP of the same" in client.run(graph).errors["sample"].splitlines()[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"teacher": "student.safetensors"}, "student.safetensors: a student already, made by vsd. Choose what"),
        ({"folder": "/nowhere"}, "/nowhere: no such folder. Give the path of"),
        ({"name": "../out"}, "name '../out' leads out of"),
    ],
)
def test_a_training_that_cannot_be_is_told_once(client, wrong, said):
    given = {"teacher": "bundled: teacher", "minutes": 1.0, "name": "it", "training_seed": 0, "folder": ""} | wrong
    graph = {"train": node("OneStepTrainStudent", prompts="", batch_size=4, **given)}
    told = client.run(graph | {"report": node("PreviewAny", source=["train", 3])}).errors
    assert list(told) == ["train"] and told["train"].startswith(said) and told["train"].count(said) == 1
