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
from refresh import FOLDER, LOCAL, WORKFLOWS, definitions, describe, gallery, pictures, read
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


@pytest.mark.parametrize("name", LOCAL)
def test_has_a_thumbnail(name):
    with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
        assert thumbnail.width == thumbnail.height >= 256


def test_all_are_drawn_and_the_gallery_shows_them():
    assert sorted(WORKFLOWS) == sorted(p.stem for p in FOLDER.glob("*.json")) and len(WORKFLOWS) >= 12
    assert (PACK / "docs/gallery.md").read_text("utf-8") == gallery()


TITLE = 30  # what is drawn above a node's position
PREVIEW = 210  # how much a sampler grows when it shows one
SHOW = ("KSampler", "OneStepSample", "SamplerCustomAdvanced", "OneStepTrainStudent")
TIGHT = 50  # to the next node in a column: its title, and room for the badge that Vue nodes write in the body


def boxes(workflow: dict) -> dict[int, tuple[float, float, float, float]]:
    """Node -> left, top (of its title), right, bottom (of its preview)."""
    found = {}
    for n in workflow["nodes"]:
        (x, y), (width, height) = n["pos"], n["size"]
        height += PREVIEW if n["type"] in SHOW else 0
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
    """ComfyUI's, with the files that workflows of public models need in its lists."""
    path, info = tmp_path_factory.mktemp("info") / "object_info.json", server.json("/object_info")
    for name in WORKFLOWS:
        for n in read(f"api/{name}").values():
            inputs = info[n["class_type"]]["input"]
            for key, (kind, *options) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
                choices = kind if isinstance(kind, list) else options[0].get("options") if options else None
                value = n["inputs"].get(key)
                if isinstance(choices, list) and str(value).endswith((".safetensors", ".bin", ".gguf")):
                    choices.append(value)
    path.write_text(json.dumps(info), "utf-8")
    return path


@needs_cli
def test_what_workflows_build_describes_is_what_is_here(object_info, tmp_path, monkeypatch):
    """`refresh.py` was run after the last change of a description or a schema."""
    for name in ("workflows/api", "docs", "locales/en"):
        (tmp_path / name).mkdir(parents=True)
    for name in WORKFLOWS:
        (tmp_path / f"workflows/{name}.json").write_bytes((FOLDER / f"{name}.json").read_bytes())
    monkeypatch.setattr("refresh.PACK", tmp_path)
    monkeypatch.setattr("refresh.FOLDER", tmp_path / "workflows")
    info = json.loads(object_info.read_text("utf-8"))
    describe(info)
    for path in tmp_path.rglob("*.json"):
        assert json.loads(path.read_text("utf-8")) == json.loads((PACK / path.relative_to(tmp_path)).read_text("utf-8"))


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_languages_name_every_node_input_and_output(object_info, language):
    """None missing, none that is no more, and none left in English."""
    english = definitions(json.loads(object_info.read_text("utf-8")))
    found = json.loads((PACK / f"locales/{language}/nodeDefs.json").read_text("utf-8"))
    assert keys(found).keys() == keys(english).keys()
    if language == "en":
        assert found == english
        return
    for path, text in keys(found).items():
        assert text and (path[-1] == "name" or any(ord(c) > 0x2E80 for c in text)), path
        assert not set(text) & set(",:;()"), f"{path}: punctuation of half width"


def keys(tree: dict, path: tuple = ()) -> dict:
    """(key, key, ...) -> text of a nested dictionary."""
    found = {}
    for k, v in tree.items():
        found |= keys(v, (*path, k)) if isinstance(v, dict) else {(*path, k): v}
    return found


@needs_cli
@pytest.mark.parametrize("name", WORKFLOWS)
def test_comfy_cli_validates(name, object_info, tmp_path):
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--json", "workflow", "validate"]
    files = ["--workflow", str(FOLDER / f"api/{name}.json"), "--input", str(object_info)]
    quiet = os.environ | {"DO_NOT_TRACK": "1", "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(command + files, env=quiet, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"], done.stdout


OF_THE_WORLD = {
    "one-step-text-to-image": 4, "teacher-and-student": 4, "four-bit-text-to-image": 4, "quantize-your-model": 4,
    "negative-prompt-in-one-step": 4,
}  # fmt: skip
"""those whose pictures show the longest prompt, and how many of each"""


@pytest.mark.parametrize("name", OF_THE_WORLD)
def test_makes_what_its_prompt_says(name, client):
    graph = api(name)
    texts = [v for n in graph.values() for k, v in n["inputs"].items() if k in ("text", "value") and isinstance(v, str)]
    asked, stated = attributes_of(max(texts, key=len))  # the others are empty
    for title, images in pictures(client, graph).items():
        assert len(images) == OF_THE_WORLD[name] and all(p.size == (256, 256) for p in images)
        read = metrics.Judge.load().read(pixels_of(images)).attributes
        right = metrics.all_right(read, asked.expand_as(read), stated.expand_as(read))
        assert right.sum() >= 3, f"{title}: {[shapes.prompt(a) for a in read]}"


def pixels_of(images: list) -> torch.Tensor:
    """Pictures that were enlarged four times -> (B, 3, 64, 64) in [-1, 1]."""
    pixels = np.stack([np.asarray(p)[::4, ::4] for p in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("name", sorted(set(LOCAL) - set(OF_THE_WORLD) - {"inpaint-with-a-student"}))
def test_runs_on_what_comes_with_onestep(name, client):
    graph = api(name)
    for n in graph.values():
        quick = {"minutes": 0.1, "queries": 3, "batches": 1}
        quick |= {"steps": 2} if n["class_type"] == "TrainLoraNode" else {}
        n["inputs"] |= {k: v for k, v in quick.items() if k in n["inputs"]}
    made = pictures(client, graph)
    assert made and all(np.asarray(p).std() > 5 for images in made.values() for p in images)


def test_what_the_mask_of_the_inpainting_protects_stays(client):
    before, after = map(pixels_of, pictures(client, api("inpaint-with-a-student")).values())
    change = (before - after).abs().mean((0, 1, 2))  # (W,)
    assert change[48:].max() < 0.05 < 0.1 < change[:32].max()


@pytest.mark.slow
def test_the_lora_teaches_the_four_bit_student_what_its_pictures_show(client):
    before, after = map(pixels_of, list(pictures(client, api("four-bit-and-lora")).values()))
    asked, stated = attributes_of("a large green heart on a pink background, in the center")
    right = []
    for shown in (before, after):
        read = metrics.Judge.load().read(shown).attributes
        right.append(metrics.all_right(read, asked.expand_as(read), stated.expand_as(read)).sum())
    assert right[0] == 0 and right[1] >= 3, right


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
