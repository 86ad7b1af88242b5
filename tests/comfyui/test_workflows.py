"""The shipped workflows: their files, comfy-cli's opinion of them, and the images they make."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from refresh import FOLDER, WORKFLOWS, pictures, read, to_api
from server import PACK

from distill.file.metadata import read_metadata
from distill.tutorial import metrics, shapes
from distill.tutorial.bundled import bundled

SCHEMA = PACK.parent / "shared/reference/workflow-0.4.schema.json"
needs_cli = pytest.mark.skipif(importlib.util.find_spec("comfy_cli") is None, reason="pip install comfy-cli")


def api(name: str) -> dict:
    return read(f"api/{name}")


@pytest.mark.parametrize("name", WORKFLOWS)
@pytest.mark.skipif(not SCHEMA.is_file(), reason=f"{SCHEMA} is not here")
def test_follows_the_schema(name):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    jsonschema.validate(read(name), json.loads(SCHEMA.read_text("utf-8")))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_says_where_its_nodes_come_from_and_what_to_look_at(name):
    workflow = read(name)
    nodes = [n for n in workflow["nodes"] if n["type"] != "MarkdownNote"]
    for n in nodes:
        ours = n["type"].startswith("OneStep")
        assert n["properties"]["cnr_id"] == ("onestep" if ours else "comfy-core") and n["properties"]["ver"]
        assert n["properties"]["Node name for S&R"] == n["type"]
    assert workflow["version"] == 0.4 and len(nodes) < len(workflow["nodes"])
    with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
        assert thumbnail.width == thumbnail.height >= 256


TITLE = 30  # what is drawn above a node's position
PREVIEW = 210  # how much a sampler grows when it shows one
TIGHT = 50  # to the next node in a column: its title, and room for the badge that Vue nodes write in the body


def boxes(workflow: dict) -> dict[int, tuple[float, float, float, float]]:
    """Node -> left, top (of its title), right, bottom (of its preview)."""
    found = {}
    for n in workflow["nodes"]:
        (x, y), (width, height) = n["pos"], n["size"]
        height += PREVIEW if n["type"] in ("KSampler", "OneStepSample") else 0
        found[n["id"]] = x, y - TITLE, x + width, y + (0 if n["flags"].get("collapsed") else height)
    return found


@pytest.mark.parametrize("name", WORKFLOWS)
def test_nodes_lie_apart_inside_their_groups(name):
    workflow = read(name)
    found = boxes(workflow)
    for a, first in found.items():
        for b, second in found.items():
            apart = first[2] + 20 <= second[0] or first[3] + TIGHT - TITLE <= second[1]
            assert a == b or apart or second[2] + 20 <= first[0] or second[3] + TIGHT - TITLE <= first[1], (a, b)
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        for node, (left, top, right, bottom) in found.items():
            outside = right < x or left > x + width or bottom < y or top > y + height
            assert outside or (x < left and right < x + width and y + 40 < top and bottom < y + height), node


@pytest.mark.parametrize("name", WORKFLOWS)
def test_opens_whole_on_a_small_screen(name):
    """Beside the side bar, under the tabs and the Run button, of 1280 x 800 pixels, and large enough to be read."""
    workflow = read(name)
    scale, (dx, dy) = workflow["extra"]["ds"]["scale"], workflow["extra"]["ds"]["offset"]
    lefts, tops, rights, bottoms = zip(*boxes(workflow).values(), *(corners(g) for g in workflow["groups"]))
    assert scale >= 0.65  # below 0.6 the old canvas draws no text
    assert (min(lefts) + dx) * scale > 80 and (min(tops) + dy) * scale > 95
    assert (max(rights) + dx) * scale < 1270 and (max(bottoms) + dy) * scale < 790


def corners(group: dict) -> tuple[float, float, float, float]:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


@pytest.mark.parametrize("name", WORKFLOWS)
def test_notes_are_readable_with_vue_nodes(name):
    """Which write inline code in blue on the note's brown."""
    for n in read(name)["nodes"]:
        assert n["type"] != "MarkdownNote" or "`" not in n["widgets_values"][0]


def test_the_teacher_is_called_as_its_file_recommends():
    teacher = read_metadata(bundled("teacher"))
    settings = next(n["inputs"] for n in api("teacher-and-student").values() if n["class_type"] == "KSampler")
    assert (settings["steps"], settings["cfg"]) == (teacher.steps, teacher.guidance["scale"])


@pytest.fixture(scope="module")
def object_info(server, tmp_path_factory):
    path = tmp_path_factory.mktemp("info") / "object_info.json"
    path.write_bytes(server.get("/object_info"))
    return path


@needs_cli
@pytest.mark.parametrize("name", WORKFLOWS)
def test_api_twin_is_the_same_graph(name, object_info):
    assert api(name) == to_api(read(name), json.loads(object_info.read_text("utf-8")))


@needs_cli
@pytest.mark.parametrize("name", WORKFLOWS)
def test_comfy_cli_validates(name, object_info, tmp_path):
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--json", "workflow", "validate"]
    files = ["--workflow", str(FOLDER / f"api/{name}.json"), "--input", str(object_info)]
    quiet = os.environ | {"DO_NOT_TRACK": "1", "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(command + files, env=quiet, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"], done.stdout


@pytest.mark.parametrize("name", WORKFLOWS)
def test_makes_what_its_prompt_says(name, client):
    graph = api(name)
    texts = [v for n in graph.values() for k, v in n["inputs"].items() if k in ("text", "value") and isinstance(v, str)]
    asked, stated = attributes_of(max(texts, key=len))  # the others are empty
    for title, images in pictures(client, graph).items():
        assert len(images) == 4 and all(p.size == (256, 256) for p in images)
        pixels = np.stack([np.asarray(p)[::4, ::4] for p in images])  # undo the enlargement
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        read = metrics.Judge.load().read(tensor).attributes
        right = metrics.all_right(read, asked.expand_as(read), stated.expand_as(read))
        assert right.sum() >= 3, f"{title}: {[shapes.prompt(a) for a in read]}"


def attributes_of(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt -> which attributes it asks for (5,), and which of them it states (5,)."""
    subject, _, rest = prompt.partition(" on a ")
    background, _, position = rest.partition(" background")
    where = {"background": background, "position": position.strip(", ").removeprefix("in the ")}
    asked, stated = [], []
    for name, words in shapes.ATTRIBUTES.items():
        text = where.get(name, subject)
        found = [i for i, w in enumerate(words) if (text == w if name in where else w in text.split())]
        asked.append(found[0] if found else 0)
        stated.append(bool(found))
    return torch.tensor(asked), torch.tensor(stated)
