"""A person's first minute: the page opens, a workflow is dropped on it, Run is pressed, the image appears."""

import json
import os

import mutants
import pytest
import tiny
import torch
from browser import FIT, QUEUE, drop, drop_and_run, opened, vue
from chromium import NO_CHROMIUM, chromium
from graphs import scheduled
from refresh import LOCAL, WORKFLOWS
from server import PACK, node
from shots import ALONE

from distill.file.workflow import student_graph

DRAWN = """() => [...document.querySelectorAll('[data-node-id]')].map(node => {
    const box = node.getBoundingClientRect();
    return [node.innerText.split("\\n")[0], box.left, box.top, box.right, box.bottom];
})"""
TOLD = """window.app.graph.nodes.find(n => n.type === "OneStepRecipe")
    ?.widgets.find(w => w.name === "$$node-text-preview")?.value"""
QUICK = sorted(set(LOCAL) - {"train-a-student", "four-bit-and-lora"})  # which train
VISIBLE = "() => [...document.querySelectorAll('[role=dialog], [role=alert]')].map(e => e.innerText).join(' / ')"


@pytest.fixture(scope="module")
def page(server):
    pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if chromium() is None:
        pytest.skip(NO_CHROMIUM)
    with opened(server.url) as page:
        yield page


def screenshot(page, name: str, otherwise) -> None:
    page.screenshot(path=f"{os.environ.get('ONESTEP_SCREENSHOTS', otherwise)}/{name}.png")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_vue_nodes_do_not_overlap_and_the_old_canvas_shows_text(page, name, tmp_path):
    path = PACK / "workflows" / f"{name}.json"
    workflow = json.loads(path.read_text("utf-8"))
    vue(page, True)
    try:
        drop(page, path, workflow)
        page.wait_for_function(
            "count => document.querySelectorAll('[data-node-id]').length === count", arg=len(workflow["nodes"])
        )
        page.wait_for_timeout(500)  # they grow to what is in them
        screenshot(page, f"{name}-vue", tmp_path)
        drawn = page.evaluate(DRAWN)
        for a, (name_a, *first) in enumerate(drawn):
            for name_b, *second in drawn[:a]:
                apart = first[2] <= second[0] or first[3] <= second[1] or second[2] <= first[0] or second[3] <= first[1]
                assert apart, (name_a, name_b)
            assert first[0] > 60 and first[1] > 90 and first[2] < 1920 and first[3] < 1080, name_a
    finally:
        vue(page, False)
    page.evaluate(FIT)
    page.wait_for_timeout(500)  # it moves there
    screenshot(page, f"{name}-fitted", tmp_path)
    assert page.evaluate("() => window.app.canvas.ds.scale") >= 0.65


def runs(page, path, graph: dict) -> None:
    """What a dropped file opens runs, and nothing is wrong on the page."""
    drop_and_run(page, path, graph)
    assert "issing" not in page.evaluate(VISIBLE)
    assert not page.problems, page.problems


@pytest.mark.parametrize("name", QUICK)
def test_drop_run_and_see(page, name, tmp_path):
    path = PACK / "workflows" / f"{name}.json"
    runs(page, path, json.loads(path.read_text("utf-8")))
    page.wait_for_timeout(1500)  # the canvas redraws
    screenshot(page, name, tmp_path)


def test_a_students_file_opens_its_own_graph(page, folder):
    graph = student_graph("dropped.safetensors", 64, "a red ring")
    path = tiny.write(folder / "dropped.safetensors", torch.float16, **mutants.SMALL, workflow=graph)
    page.evaluate("() => window.app.refreshComboInNodes()")  # the file is new in the list
    runs(page, path, graph)
    loader = "window.app.graph.nodes.find(n => n.type === 'OneStepLoadStudent').widgets[0].value"
    assert page.evaluate(loader) == path.name


def test_a_blueprint_comes_out_of_the_node_library_as_one_node_and_runs(page):
    page.evaluate("() => window.app.graph.clear()")
    vue(page, True)  # the old canvas shows no picture on a subgraph's node
    try:
        page.keyboard.press("n")
        page.get_by_placeholder("Search").first.fill("One-step text to image")
        page.get_by_text("One-step text to image", exact=True).first.click()
        page.mouse.click(1000, 300)
        page.wait_for_function("() => window.app.graph.nodes.length === 1")
        page.locator(QUEUE).first.click()
        shown = page.locator("[data-node-id] img")
        shown.nth(3).wait_for()
        assert shown.first.evaluate("i => i.decode().then(() => i.naturalWidth)") == 64
        assert not page.problems, page.problems
    finally:
        vue(page, False)


@pytest.mark.parametrize(("new", "steps"), [(False, 4), (True, 3)])
def test_the_recipe_is_told_on_its_node(page, new, steps, tmp_path):
    guider = node("BasicGuider", model=["recipe", 0], conditioning=["positive", 0])
    graph = scheduled("few-steps.safetensors", guider)
    graph["recipe"] = node("OneStepRecipe", model=["load", 0], family="auto", steps=steps)
    graph["sample"]["inputs"] |= {"sampler": ["recipe", 1], "sigmas": ["recipe", 2]}
    del graph["schedule"]
    vue(page, new)
    try:
        page.evaluate("graph => window.app.loadApiJson(graph, 'recipe')", graph)
        page.locator(QUEUE).first.click()
        page.wait_for_function(f"() => ({TOLD} || '').includes('(what its file says): {steps} steps at 999')")
        page.evaluate(FIT)
        page.wait_for_timeout(1000)
        screenshot(page, f"recipe{'-vue' * new}", tmp_path)
        assert page.get_by_text(f"{steps} steps at 999").first.is_visible()
    finally:
        vue(page, False)


def test_workflows_are_in_the_template_gallery(server):
    templates = server.json("/api/workflow_templates")
    assert set(templates["onestep-nodes"]) >= {p.stem for p in (PACK / "workflows").glob("*.json")}


def test_help_page_opens_on_the_page_with_the_nodes_picture(page):
    """The Markdown file, beside the canvas, and the picture that it names."""
    page.evaluate(ALONE, ["OneStepSample", ""])
    page.evaluate("() => window.app.canvas.selectItems(window.app.graph.nodes)")
    page.locator("[data-testid='info-button']").first.dispatch_event("click")  # a panel of an earlier test may cover it
    picture = page.locator("img[src$='OneStepSample.webp']")
    picture.wait_for()
    assert picture.evaluate("i => i.decode().then(() => i.naturalWidth)") > 300
    assert page.get_by_text("Stock samplers scale their noise").first.is_visible()


@pytest.mark.parametrize("name", sorted(p.stem for p in (PACK / "web/docs").glob("*.md")))
def test_every_help_page_shows_its_node(name):
    text = (PACK / f"web/docs/{name}.md").read_text("utf-8")
    assert f"](images/{name}.webp)" in text and (PACK / f"web/docs/images/{name}.webp").stat().st_size < 50_000
