"""The graph that a student's file carries for ComfyUI's canvas, and that a wheel carries for the students it makes."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from distill.backbones import load
from distill.file.metadata import read_metadata
from distill.file.workflow import student_graph
from distill.header import read_header
from distill.quantize.run import Quantize, quantize_file

ROOT = Path(__file__).parents[2]


def values(graph, kind):
    return next(node["widgets_values"] for node in graph["nodes"] if node["type"] == kind)


def test_for_the_tutorials_own_file_it_is_the_one_in_workflows():
    text = (ROOT / "workflows/one-step-text-to-image.json").read_text("utf-8")
    assert student_graph("bundled: student") == json.loads(text)


def test_a_saved_student_carries_it_and_so_does_its_quantized_file(tmp_path):
    teacher = load(tiny.write(tmp_path / "teacher.safetensors", unet={"sample_size": (16, 16)}, method="teacher"))
    path = teacher.save_student(tmp_path / "mine.safetensors", teacher.net, method="vsd")
    graph = json.loads(read_header(path)["__metadata__"]["workflow"])  # what ComfyUI's page reads
    assert values(graph, "OneStepLoadStudent") == ["mine.safetensors"]
    assert values(graph, "EmptyLatentImage")[:2] == [128, 128] and values(graph, "ImageScaleBy")[1] == 2
    assert values(graph, "CLIPTextEncode") == [""] and not [n for n in graph["nodes"] if n["type"] == "MarkdownNote"]
    quantize_file(path, tmp_path / "small.safetensors", Quantize(method="rtn"))
    small = read_metadata(tmp_path / "small.safetensors").workflow
    assert values(small, "OneStepLoadStudent") == ["small.safetensors"]
    assert {**small, "nodes": None} == {**graph, "nodes": None}


def test_every_link_of_a_graph_without_the_note_still_ends_at_a_node():
    graph = student_graph("a.safetensors", 512, "a cat")
    ids = {node["id"] for node in graph["nodes"]}
    assert all({link[1], link[3]} <= ids for link in graph["links"])


@pytest.mark.parametrize("found", ["{}", '{"nodes": [7]}', '{"nodes": 1}'])
def test_a_graph_that_is_none_does_not_stop_quantizing(tmp_path, found):
    from safetensors.torch import load_file, save_file

    source = tiny.write(tmp_path / "a.safetensors", torch.float16)
    strings = read_header(source)["__metadata__"] | {"workflow": found}
    save_file(load_file(source), tmp_path / "b.safetensors", strings)
    quantize_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors", Quantize(method="rtn"))
    assert read_header(tmp_path / "c.safetensors")["__metadata__"]["workflow"] == found
