"""ComfyUI's page in a real Chromium."""

import base64
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for scripts
from chromium import launched  # noqa: E402

READY = "() => window.app?.extensionManager && window.app.graph && !window.app.extensionManager.spinner"
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
SET = "([name, value]) => window.app.extensionManager.setting.set(name, value)"
QUEUE = "[data-testid='queue-button']"


@contextmanager
def opened(url: str, width: int = 1920, height: int = 1080, **options) -> Iterator:
    """Playwright's page of a running ComfyUI, its exceptions in `problems`. Raises RuntimeError without a Chromium."""
    with launched() as browser:
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(120_000)
        page.problems = []
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        page.locator(".p-blockui-mask").first.wait_for(state="hidden")
        yield page


def vue(page, on: bool) -> None:
    """Nodes as HTML, or on the old canvas."""
    page.evaluate(SET, ["Comfy.VueNodes.Enabled", on])


def drop(page, path: Path, graph: dict) -> None:
    """Drop a file on the canvas and wait until its graph is there."""
    page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode()])
    page.wait_for_function(DROPPED, arg=sorted(n.get("title") or "" for n in graph["nodes"]))


def drop_and_run(page, path: Path, graph: dict) -> None:
    """Drop a file on the canvas; run what opens until its images are there."""
    drop(page, path, graph)
    page.evaluate(FIT)  # a node that is not drawn loads no images
    page.locator(QUEUE).first.click()
    page.wait_for_function(DONE)
