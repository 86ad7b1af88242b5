"""A person's first minute: the page opens, a workflow is dropped on it, Run is pressed, the image appears."""

import base64
import json
import os
import shutil

import mutants
import pytest
import tiny
import torch
from graphs import scheduled
from refresh import LOCAL, WORKFLOWS
from server import PACK, node

from distill.file.workflow import student_graph

READY = "() => window.app?.extensionManager && window.app.graph && !window.app.extensionManager.spinner"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DROP = """([name, data]) => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type: name.endsWith(".json") ? "application/json" : ""}));
    const canvas = document.querySelector("#graph-canvas"), box = canvas.getBoundingClientRect();
    const where = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer, ...where}));
}"""
DROPPED = """titles => {
    const shown = window.app.graph.nodes.map(n => n.title);
    return titles.filter(t => t).every(t => shown.includes(t)) && shown.length === titles.length;
}"""
SAVERS = "window.app.graph.nodes.filter(n => n.type === 'SaveImage')"
DONE = f"() => {SAVERS}.every(n => n.imgs?.length && n.imgs.every(i => i.complete && i.naturalWidth > 0))"
FIT = "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"
VUE = "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
DRAWN = """() => [...document.querySelectorAll('[data-node-id]')].map(node => {
    const box = node.getBoundingClientRect();
    return [node.innerText.split("\\n")[0], box.left, box.top, box.right, box.bottom];
})"""
TOLD = """window.app.graph.nodes.find(n => n.type === "OneStepRecipe")
    ?.widgets.find(w => w.name === "$$node-text-preview")?.value"""
QUICK = sorted(set(LOCAL) - {"train-a-student"})  # which takes its five minutes
VISIBLE = "() => [...document.querySelectorAll('[role=dialog], [role=alert]')].map(e => e.innerText).join(' / ')"


@pytest.fixture(scope="module")
def page(server):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: apt install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1920, "height": 1080})
        page.set_default_timeout(120_000)
        page.problems = []
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.goto(server.url, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        page.locator(".p-blockui-mask").first.wait_for(state="hidden")
        yield page
        browser.close()


def drop(page, path, graph: dict) -> None:
    """Drop a file on the canvas and wait until its graph is there."""
    page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode()])
    page.wait_for_function(DROPPED, arg=sorted(n.get("title") or "" for n in graph["nodes"]))


def screenshot(page, name: str, otherwise) -> None:
    page.screenshot(path=f"{os.environ.get('ONESTEP_SCREENSHOTS', otherwise)}/{name}.png")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_vue_nodes_do_not_overlap_and_the_old_canvas_shows_text(page, name, tmp_path):
    path = PACK / "workflows" / f"{name}.json"
    workflow = json.loads(path.read_text("utf-8"))
    page.evaluate(VUE, True)
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
        page.evaluate(VUE, False)
    page.evaluate(FIT)
    page.wait_for_timeout(500)  # it moves there
    screenshot(page, f"{name}-fitted", tmp_path)
    assert page.evaluate("() => window.app.canvas.ds.scale") >= 0.65


def drop_and_run(page, path, graph: dict) -> None:
    """Drop a file on the canvas; run what opens until its images are there."""
    drop(page, path, graph)
    page.evaluate(FIT)  # a node that is not drawn loads no images
    page.locator("[data-testid='queue-button']").first.click()
    page.wait_for_function(DONE)
    assert "issing" not in page.evaluate(VISIBLE)
    assert not page.problems, page.problems


@pytest.mark.parametrize("name", QUICK)
def test_drop_run_and_see(page, name, tmp_path):
    path = PACK / "workflows" / f"{name}.json"
    drop_and_run(page, path, json.loads(path.read_text("utf-8")))
    page.wait_for_timeout(1500)  # the canvas redraws
    screenshot(page, name, tmp_path)


def test_a_students_file_opens_its_own_graph(page, folder):
    graph = student_graph("dropped.safetensors", 64, "a red ring")
    path = tiny.write(folder / "dropped.safetensors", torch.float16, **mutants.SMALL, workflow=graph)
    page.evaluate("() => window.app.refreshComboInNodes()")  # the file is new in the list
    drop_and_run(page, path, graph)
    loader = "window.app.graph.nodes.find(n => n.type === 'OneStepLoadStudent').widgets[0].value"
    assert page.evaluate(loader) == path.name


def test_a_blueprint_comes_out_of_the_node_library_as_one_node_and_runs(page):
    page.evaluate("() => window.app.graph.clear()")
    page.evaluate(VUE, True)  # the old canvas shows no picture on a subgraph's node
    try:
        page.keyboard.press("n")
        page.get_by_placeholder("Search").first.fill("One-step text to image")
        page.get_by_text("One-step text to image", exact=True).first.click()
        page.mouse.click(1000, 300)
        page.wait_for_function("() => window.app.graph.nodes.length === 1")
        page.locator("[data-testid='queue-button']").first.click()
        shown = page.locator("[data-node-id] img")
        shown.nth(3).wait_for()
        assert shown.first.evaluate("i => i.decode().then(() => i.naturalWidth)") == 64
        assert not page.problems, page.problems
    finally:
        page.evaluate(VUE, False)


@pytest.mark.parametrize(("vue", "steps"), [(False, 4), (True, 3)])
def test_the_recipe_is_told_on_its_node(page, vue, steps, tmp_path):
    guider = node("BasicGuider", model=["recipe", 0], conditioning=["positive", 0])
    graph = scheduled("few-steps.safetensors", guider)
    graph["recipe"] = node("OneStepRecipe", model=["load", 0], family="auto", steps=steps)
    graph["sample"]["inputs"] |= {"sampler": ["recipe", 1], "sigmas": ["recipe", 2]}
    del graph["schedule"]
    page.evaluate(VUE, vue)
    try:
        page.evaluate("graph => window.app.loadApiJson(graph, 'recipe')", graph)
        page.locator("[data-testid='queue-button']").first.click()
        page.wait_for_function(f"() => ({TOLD} || '').includes('(what its file says): {steps} steps at 999')")
        page.evaluate(FIT)
        page.wait_for_timeout(1000)
        screenshot(page, f"recipe{'-vue' * vue}", tmp_path)
        assert page.get_by_text(f"{steps} steps at 999").first.is_visible()
    finally:
        page.evaluate(VUE, False)


def test_workflows_are_in_the_template_gallery(server):
    templates = server.json("/api/workflow_templates")
    assert set(templates["onestep-nodes"]) >= {p.stem for p in (PACK / "workflows").glob("*.json")}


def test_help_page_opens_on_the_page(page):
    """What the page shows for a node's help is the Markdown file."""
    text = page.evaluate("async () => (await fetch('/extensions/onestep-nodes/docs/OneStepSample.md')).text()")
    assert text.startswith("# OneStep Sample")
