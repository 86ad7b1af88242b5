"""The pictures of ComfyUI's page: each node's for its help page, and the README's two. refresh.py makes them too;
`python tests/comfyui/shots.py` makes them alone, with a ComfyUI that it starts."""

import io
import json
from pathlib import Path

from browser import SET, drop_and_run, opened, vue
from PIL import Image
from server import PACK, Server, served

NODES = PACK / "web/docs/images"
SCALE = 1.5  # pixels of a node's picture to one of the page
EDGE = 8  # pixels around a node: its slots reach over it
QUIET = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.NodeBadge.NodeSourceBadgeMode": "None"}
FILES = {
    "OneStepLoad4Bit": "diffusion_models/student-4bit.safetensors",
    "OneStepLoad4BitCLIP": "text_encoders/t5xxl-4bit.safetensors",
}
"""what these loaders show: a folder of models, and the name of a file in it"""
ALONE = """([name, file]) => {
    const {app, LiteGraph} = window;
    [...app.graph.nodes].forEach(n => app.graph.remove(n));  // clear() gives the next one this one's number, and values
    const node = LiteGraph.createNode(name);
    app.graph.add(node);
    if (file) node.widgets[0].value = file;
    node.pos = [0, 0];
    Object.assign(app.canvas.ds, {scale: 1, offset: [200, 150]});
    app.canvas.setDirty(true, true);
    return node.id;
}"""
OPENED = "ds => { Object.assign(window.app.canvas.ds, ds); window.app.canvas.setDirty(true, true); }"


def write(shot: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(shot)).convert("RGB").save(path, quality=80, method=6)


def nodes(server: Server) -> None:
    """Every node of the pack as it comes out of the library, beside its help page."""
    for file in FILES.values():
        path = server.base / "models" / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with opened(server.url, 900, 1200, device_scale_factor=SCALE) as page:
        quiet(page)
        for name in sorted(p.stem for p in (PACK / "web/docs").glob("*.md")):
            number = page.evaluate(ALONE, [name, Path(FILES.get(name, "")).name])
            node = page.locator(f"[data-node-id='{number}']")
            node.wait_for()
            page.wait_for_timeout(700)  # it grows to what is in it
            box = node.bounding_box()
            around = {"x": box["x"] - EDGE, "y": box["y"] - EDGE}
            around |= {"width": box["width"] + 2 * EDGE, "height": box["height"] + 2 * EDGE}
            write(page.screenshot(clip=around), NODES / f"{name}.webp")


def readme(server: Server) -> None:
    """A workflow that ran, and the gallery of templates."""
    with opened(server.url, 1280, 800) as page:
        quiet(page)
        vue(page, False)  # which says when pictures are there
        path = PACK / "workflows/teacher-and-student.json"
        workflow = json.loads(path.read_text("utf-8"))
        drop_and_run(page, path, workflow)
        page.evaluate(OPENED, workflow["extra"]["ds"])
        page.wait_for_timeout(2000)
        write(page.screenshot(), PACK / "docs/comfyui-workflow.webp")
        page.set_viewport_size({"width": 1280, "height": 1100})
        page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        page.get_by_text("onestep-nodes").last.click()
        page.wait_for_timeout(4000)
        write(page.screenshot(), PACK / "docs/comfyui-templates.webp")


def quiet(page) -> None:
    """Nothing on the canvas but nodes, which are HTML."""
    for setting in QUIET.items():
        page.evaluate(SET, list(setting))
    vue(page, True)


if __name__ == "__main__":
    with served() as server:
        nodes(server)
        readme(server)
