"""OneStepQuantize in a real ComfyUI: what it makes, what it says, where it writes and where it must not."""

import json
import time

import pytest
import tiny
from graphs import FOUR_BITS, load_4bit, one_step, quantize
from safetensors.torch import load_file, save_file
from test_nodes import close, latent_of

from distill.packed import weight
from distill.quantize.source import relative


def test_the_node_makes_a_smaller_file_and_says_how(quantized, folder):
    path, text, run = quantized
    dense = load_file(folder / "student.safetensors")
    marked = weight.layers(load_file(path))
    assert len([m for m in marked if m.startswith("model.diffusion_model.")]) > 60
    assert any(m.startswith("cond_stage_model.") for m in marked)
    assert path.stat().st_size < 0.5 * sum(2 * t.numel() for t in dense.values())
    assert "calibrated on 1 prompts" in text and "bits per weight" in text
    steps = [e for e in run.events if e == ("progress", "quantize")]
    assert len(steps) > 3
    seconds = float(text.splitlines()[-1].removesuffix(" s"))
    assert 0.5 * run.seconds < seconds + 0.05 and seconds - 0.05 < run.seconds  # calibration takes most of them


def test_the_tutorials_prompts_are_for_the_tutorials_models(client):
    """The tiny model's tokenizer has other words than the bundled one's."""
    run = client.run(quantize("student.safetensors", name="general", prompts="", text_encoder=False))
    assert not run.errors and "calibrated on 64 general prompts" in run.outputs["quantize"]["text"][0]


def test_a_file_just_made_goes_straight_into_a_loader(client, folder):
    graph = one_step("student.safetensors", model=("four", 0)) | quantize("student.safetensors", name="chained")
    graph |= load_4bit(["quantize", 0])
    first = latent_of(client, graph)
    run = client.run(graph)  # nothing changed: nothing is quantized again
    assert ("executing", "quantize") not in run.events and ("progress", "quantize") not in run.events
    (folder / "chained.safetensors").unlink()
    close(latent_of(client, graph), first, 1e-6)
    assert (folder / "chained.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "bits", "budget"), [("rtn", "3", 0.0), ("svd", "4", 0.0), ("smoothquant", "8", 0.0), ("auto", "4", 5.0)]
)
def test_methods(client, method, bits, budget):
    name = f"by-{method}-{bits}-{budget:g}"
    options = {"method": method, "bits": bits, "budget": budget, "text_encoder": False}
    run = client.run(quantize("student.safetensors", name=name, **options))
    assert not run.errors, run.errors
    graph = one_step("student.safetensors", model=("four", 0)) | load_4bit(f"{name}.safetensors")
    assert relative(latent_of(client, graph), latent_of(client, one_step("student.safetensors"))) < 0.5


def test_other_files_are_quantized_by_their_weights(client, folder):
    sd = {k.removeprefix("model.diffusion_model."): t for k, t in load_file(folder / "student.safetensors").items()}
    save_file({k: t for k, t in sd.items() if "_model." not in k}, folder / "outsider.safetensors")
    run = client.run(quantize("outsider.safetensors"))
    assert not run.errors, run.errors
    assert "data-free: connect the file's MODEL and CLIP" in run.outputs["quantize"]["text"][0]
    assert len(weight.layers(load_file(folder / "outsider-4bit.safetensors"))) > 60


def test_cancel_leaves_no_file(client, server, folder):
    prompt, _ = client.queue(quantize("student.safetensors", name="never", prompts="\n".join(["a ring"] * 500)))
    while json.loads(client.socket.recv()).get("type") != "progress":
        pass
    server.post("/interrupt")
    message = {}
    while message.get("type") != "execution_interrupted":
        message = json.loads(client.socket.recv())
        assert message["type"] not in ("execution_success", "execution_error"), message
    assert not list(folder.glob("*never*")) and not list(folder.glob(".*never*"))
    time.sleep(0.2)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../outside", "leads out of"),
        ("/tmp/outside", "leads out of"),
        ("half", "not a quantized one"),
        ("student", "the file to be quantized"),
        ("x" * 300, "a name of 3"),
    ],
)
def test_nothing_is_written_where_it_must_not_be(client, folder, name, problem):
    before = sorted(folder.parent.rglob("*"))
    run = client.run(quantize("student.safetensors", name=name))
    assert problem in run.errors["quantize"] and sorted(folder.parent.rglob("*")) == before


def test_rounding_to_nearest_gives_no_advice_on_calibration(client, server):
    before = len(server.log)
    run = client.run(quantize("student.safetensors", name="nearest", method="rtn"))
    assert "takes no calibration" in run.outputs["quantize"]["text"][0]
    assert "data-free" not in server.log[before:]


def test_a_file_that_is_gone_or_another_between_runs(client, folder):
    graph = quantize("coming.safetensors", name="going", method="rtn")
    source = tiny.write(folder / "coming.safetensors", seed=1)
    assert not client.run(graph).errors
    first = (folder / "going.safetensors").read_bytes()
    tiny.write(source, seed=2)
    assert not client.run(graph).errors and (folder / "going.safetensors").read_bytes() != first
    source.unlink()
    assert (
        "no such file" in client.run(graph).errors["quantize"] or "not in list" in client.run(graph).errors["quantize"]
    )


def test_wrong_options_of_the_quantizer_are_told(client, quantized):
    quantized_already = client.run(quantize(FOUR_BITS, name="twice"))
    assert FOUR_BITS in quantized_already.errors["quantize"].splitlines()[0]
    budget = client.run(quantize("student.safetensors", method="svd", budget=4.5))
    assert "budget" in budget.errors["quantize"]
