"""After a workflow was changed, in ComfyUI or by hand: `python tests/comfyui/refresh.py` writes its API twin and its
thumbnail, with a ComfyUI it starts itself (found as the tests find it) and comfy-cli's conversion."""

import json
import tempfile
from pathlib import Path

from PIL import Image
from server import HINT, PACK, Client, Server, find_comfyui

FOLDER = PACK / "workflows"
WORKFLOWS = sorted(p.stem for p in FOLDER.glob("*.json"))


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def to_api(workflow: dict, object_info: dict) -> dict:
    """The graph as the page draws it -> as the API takes it."""
    from comfy_cli.workflow_to_api import convert_ui_to_api

    return convert_ui_to_api(workflow, object_info)


def pictures(client: Client, graph: dict) -> dict[str, list[Image.Image]]:
    """Run a graph -> title of each SaveImage node: its pictures."""
    run = client.run(graph)
    if run.errors:
        raise RuntimeError(str(run.errors))
    savers = {node: entry["_meta"]["title"] for node, entry in graph.items() if entry["class_type"] == "SaveImage"}
    return {title: [client.image(i).convert("RGB") for i in run.outputs[n]["images"]] for n, title in savers.items()}


def thumbnail(rows: list[list[Image.Image]], side: int = 400) -> Image.Image:
    """Two pictures from the first row above two from the last; one row of four folds into both."""
    top, bottom = rows[0][:2], (rows[-1][:2] if len(rows) > 1 else rows[0][2:4])
    sheet = Image.new("RGB", (side, side), "white")
    half, gap = side // 2, side // 100
    for i, picture in enumerate([*top, *bottom]):
        small = picture.resize((half - gap, half - gap), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % 2 * (half + gap), i // 2 * (half + gap)))
    return sheet


def main() -> None:
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit(HINT)
    with tempfile.TemporaryDirectory() as base:
        server = Server.fresh(comfyui, Path(base))
        try:
            client = Client(server)
            for name in WORKFLOWS:
                graph = to_api(read(name), server.json("/object_info"))
                text = json.dumps(graph, indent=1, ensure_ascii=False)
                (FOLDER / f"api/{name}.json").write_text(text + "\n", "utf-8")
                thumbnail(list(pictures(client, graph).values())).save(FOLDER / f"{name}.jpg", quality=92)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
