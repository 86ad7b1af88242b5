"""The subgraph blueprints: ComfyUI lists them, and what is in them runs."""

import importlib.util
import json

import pytest
from graphs import one_step
from refresh import BLUEPRINTS, to_api
from server import PACK

pytestmark = pytest.mark.skipif(importlib.util.find_spec("comfy_cli") is None, reason="pip install comfy-cli")


def test_comfyui_lists_them_for_its_node_library(server):
    entries = server.json("/global_subgraphs")
    ours = {v["name"]: k for k, v in entries.items() if v["info"]["node_pack"] == "custom_nodes.onestep-nodes"}
    assert ours.keys() == BLUEPRINTS.keys()
    for name, key in ours.items():
        written = (PACK / f"subgraphs/{name}.json").read_text("ascii")  # ComfyUI 0.12 reads it in the system's encoding
        assert server.json(f"/global_subgraphs/{key}")["data"] == written


@pytest.fixture
def opened(server):
    """name -> the graph that is in a blueprint's node, for the API."""
    info = server.json("/object_info")
    return lambda name: to_api(json.loads((PACK / f"subgraphs/{name}.json").read_text("utf-8")), info)


def test_text_to_image_shows_pictures_by_itself(opened, client):
    graph = opened("One-step text to image")
    run = client.run(graph)
    assert not run.errors
    assert [len(out["images"]) for out in run.outputs.values()] == [4]


def test_quantize_and_load_gives_a_model_that_draws(opened, client):
    graph = opened("Quantize and load 4-bit")
    quantize, load = (
        next(k for k, n in graph.items() if n["class_type"] == kind) for kind in ("OneStepQuantize", "OneStepLoad4Bit")
    )
    graph[quantize]["inputs"] |= {"method": "rtn", "name": "of-a-blueprint"}  # others are calibrated for a minute
    others = {k: n for k, n in one_step("").items() if k != "load"}
    for n in others.values():
        n["inputs"] = {k: [load, v[1]] if isinstance(v, list) and v[0] == "load" else v for k, v in n["inputs"].items()}
    run = client.run(graph | others)
    assert not run.errors
    assert "4 bits" in run.outputs[quantize]["text"][0]
    assert client.latent(run.outputs["save"]["latents"][0]).std() > 0.1
