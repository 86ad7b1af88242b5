"""After a workflow, a node's schema or the bundled weights were changed: `python tests/comfyui/refresh.py` draws the
workflows and blueprints that workflows/build describes, writes every API twin, the English node definitions and
docs/gallery.md, runs what needs no download for the thumbnails, and takes the pictures of shots.py; all with a ComfyUI
it starts itself (found as the tests find it), comfy-cli's conversion and a Chromium. Training takes its five minutes.
`refresh.py OBJECT_INFO.json`, with a saved /object_info of ComfyUI, starts none and makes no pictures."""

import json
import sys
from pathlib import Path

import shots
from PIL import Image
from server import PACK, Client, served

FOLDER = PACK / "workflows"
sys.path.insert(0, str(FOLDER / "build"))
from blueprints import BLUEPRINTS  # noqa: E402
from descriptions import GRAPHS  # noqa: E402
from draw import draw  # noqa: E402
from subgraph import draw_blueprint  # noqa: E402

BY_HAND = ["one-step-text-to-image", "teacher-and-student", "four-bit-text-to-image"]
WORKFLOWS = [*BY_HAND, *GRAPHS]
LOCAL = [*BY_HAND, *(n for n, g in GRAPHS.items() if "Nothing to download" in g.note or "Nothing else to" in g.note)]
"""those that run on what comes with OneStep"""


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
    """Two pictures from the first row above two from the last; one row of four folds into both; one picture is all."""
    if sum(map(len, rows)) == 1:
        sheet = Image.new("RGB", (side, side), "white")
        picture = rows[0][0]
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return sheet
    top, bottom = rows[0][:2], (rows[-1][:2] if len(rows) > 1 else rows[0][2:4])
    sheet = Image.new("RGB", (side, side), "white")
    half, gap = side // 2, side // 100
    for i, picture in enumerate([*top, *bottom]):
        small = picture.resize((half - gap, half - gap), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % 2 * (half + gap), i // 2 * (half + gap)))
    return sheet


def write(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")


def describe(info: dict) -> None:
    """Everything that is made of ComfyUI's /object_info alone."""
    for name, described in GRAPHS.items():
        write(FOLDER / f"{name}.json", draw(name, described, info))
    for name, blueprint in BLUEPRINTS.items():
        write(PACK / f"subgraphs/{name}.json", draw_blueprint(name, blueprint, info))
    for name in WORKFLOWS:
        write(FOLDER / f"api/{name}.json", to_api(read(name), info))
    write(PACK / "locales/en/nodeDefs.json", definitions(info))
    (PACK / "docs/gallery.md").write_text(gallery(), "utf-8")


def definitions(info: dict) -> dict:
    """Names, descriptions and tooltips of this pack's nodes, as locales/*/nodeDefs.json hold them."""
    found = {}
    for name, schema in info.items():
        if not name.startswith("OneStep"):
            continue
        inputs = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
        found[name] = {
            "display_name": schema["display_name"],
            "description": schema["description"],
            "inputs": {n: {"name": n, "tooltip": options["tooltip"]} for n, (_, options) in inputs.items()},
            "outputs": {
                str(i): {"name": n, "tooltip": tip}
                for i, (n, tip) in enumerate(zip(schema["output_name"], schema["output_tooltips"]))
            },
        }
    return dict(sorted(found.items()))


def gallery() -> str:
    """docs/gallery.md: every workflow with its picture and the first words of its note, and the blueprints."""
    parts = [
        "# Workflows",
        "In ComfyUI: *Workflow → Browse Templates → OneStep*. Each carries a note: what to look at, what to try."
        "\nThe pictures were made by running them: `python tests/comfyui/refresh.py`.",
        "## Nothing to download",
    ]
    for name in WORKFLOWS:
        if name == next(n for n in WORKFLOWS if n not in LOCAL):
            parts.append("## With public models")
        note = next(n for n in read(name)["nodes"] if n["type"] == "MarkdownNote")["widgets_values"][0]
        title, text = note.split("\n\n")[:2]
        pictured = (FOLDER / f"{name}.jpg").is_file()
        shown = f"![{title[3:]}](../workflows/{name}.jpg)\n\n" if pictured else ""
        parts.append(f"### {title[3:]}\n\n{shown}{text}\n\n[{name}.json](../workflows/{name}.json)")
    parts += ["## Blueprints", "One node each, with a graph inside: in the node library under *Subgraph Blueprints*."]
    parts.append("\n".join(f"- **{name}**: {blueprint.about}" for name, blueprint in BLUEPRINTS.items()))
    return "\n\n".join(parts) + "\n"


def main(saved: str | None = None) -> None:
    if saved is not None:
        return describe(json.loads(Path(saved).read_text("utf-8")))
    with served() as server:
        describe(server.json("/object_info"))
        client = Client(server)
        for name in LOCAL:
            thumbnail(list(pictures(client, read(f"api/{name}")).values())).save(FOLDER / f"{name}.jpg", quality=92)
        (PACK / "docs/gallery.md").write_text(gallery(), "utf-8")  # it shows those that are there
        shots.nodes(server)
        shots.readme(server)


if __name__ == "__main__":
    main(*sys.argv[1:])
