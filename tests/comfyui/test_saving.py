"""What was changed in the graph is saved, opens again in both loaders, and makes the same latents."""

import pytest
import tiny
from graphs import load, one_step
from safetensors.torch import load_file
from server import node
from test_nodes import close, kohya_lora, latent_of

from distill.file.metadata import read_metadata

WORKFLOW = {"nodes": [], "links": [], "version": 0.4}


def saving(name: str, model: str = "load", clip: str = "load", vae: str = "load") -> dict:
    inputs = {"model": [model, 0], "clip": [clip, 1], "vae": [vae, 2]}
    return {"file": node("OneStepSaveStudent", filename_prefix=f"checkpoints/{name}", **inputs)}


def with_lora(graph: dict) -> dict:
    inputs = {"model": ["load", 0], "clip": ["load", 1], "lora_name": "bake.safetensors"}
    graph["lora"] = node("LoraLoader", **inputs, strength_model=0.8, strength_clip=0.6)
    graph["positive"]["inputs"]["clip"], graph["sample"]["inputs"]["model"] = ["lora", 1], ["lora", 0]
    return graph


@pytest.fixture(scope="module")
def output(server, folder):
    """Where files are saved to; a LoRA waits in models/loras."""
    kohya_lora(tiny.build(folder / "student.safetensors"), server.base / "models/loras/bake.safetensors")
    return server.base / "output/checkpoints"


@pytest.mark.parametrize(("file", "tolerance"), [("student", 1e-4), ("half", 0.01), ("kl", 1e-4)])
def test_a_baked_lora_is_the_lora(client, output, folder, file, tolerance):
    graph = with_lora(one_step(f"{file}.safetensors")) | saving(file, "lora", "lora")
    expected = latent_of(client, graph)
    path, source = output / f"{file}_00001_.safetensors", folder / f"{file}.safetensors"
    close(latent_of(client, one_step(path.name)), expected, tolerance)
    found, old = load_file(path), load_file(source)
    unet = [k for k in old if k.startswith("model.")]
    assert found.keys() == old.keys() and all(found[k].dtype == old[k].dtype for k in unet)


def test_four_bits_stay_four_bits(client, output, folder):
    made = node("OneStepQuantize", file="student.safetensors", name="pack", method="rtn", bits="4", text_encoder=True)
    assert not client.run({"made": made}).errors
    graph = with_lora(one_step("pack.safetensors"))
    graph["load"] = node("OneStepLoad4Bit", file="pack.safetensors", activations="float")
    expected = latent_of(client, graph | saving("packed", "lora", "lora"))
    path = output / "packed_00001_.safetensors"
    again = one_step(path.name)
    again["load"] = node("OneStepLoad4Bit", file=path.name, activations="float")
    close(latent_of(client, again), expected, 1e-3)
    assert latent_of(client, one_step(path.name)).isfinite().all()
    before, after = (
        {k for k in load_file(p) if k.endswith(".comfy_quant")} for p in (folder / "pack.safetensors", path)
    )
    assert before and before == after


def test_the_file_carries_the_workflow_and_no_figures_of_other_weights(client, output, folder):
    tiny.write(folder / "measured.safetensors", metrics={"fid": 1.0})
    plain = load("measured.safetensors") | saving("plain")
    baked = with_lora(one_step("measured.safetensors")) | saving("baked", "lora", "lora")
    for name, graph, metrics in (("plain", plain, {"fid": 1.0}), ("baked", baked, {})):
        run = client.run(graph, WORKFLOW)
        assert not run.errors and name in run.outputs["file"]["text"][0]
        meta = read_metadata(output / f"{name}_00001_.safetensors")
        assert meta.workflow == WORKFLOW and meta.metrics == metrics


def test_a_model_alone_is_saved_alone(client, output):
    graph = {"load": node("OneStepLoadStudent", file="student.safetensors")} | saving("alone")
    del graph["file"]["inputs"]["clip"], graph["file"]["inputs"]["vae"]
    assert not client.run(graph).errors
    meta = read_metadata(output / "alone_00001_.safetensors")
    assert meta.architecture["vae"] is None is meta.text_encoder


def test_parts_of_other_files_are_told(client, output):
    other = {"other": node("OneStepLoadStudent", file="kl.safetensors")}
    graph = {"load": node("OneStepLoadStudent", file="student.safetensors")} | other | saving("mixed", vae="other")
    assert "connect the VAE of the same loader" in client.run(graph).errors["file"].splitlines()[0]
    graph = {"load": node("OneStepLoadStudent", file="student.safetensors")} | saving("x" * 300)
    assert "a name of 3" in client.run(graph).errors["file"]
    assert not list(output.glob("mixed*"))
