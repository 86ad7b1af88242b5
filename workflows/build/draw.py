"""A graph described in Python -> the workflow that ComfyUI's page opens (schema version 0.4), laid out in columns."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from typing import Any

SCREEN = (1270 - 90, 790 - 110)
"""pixels that a window of 1280 x 800 leaves beside the side bar, under the tabs and the Run button"""
CORNER = (90, 110)
TITLE, GAP, BESIDE = 30, 56, 35
LEAST = 0.65  # of a scale: smaller text is not drawn
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
PREVIEWS = {"KSampler": 210, "OneStepSample": 210, "SamplerCustomAdvanced": 210, "OneStepTrainStudent": 290}
"""how much a node grows when it shows a preview"""
SAID = {"OneStepRecipe": 90}
"""room for what a node says below its widgets"""
COLOURS = {"prompt": ("#232", "#353"), "note": ("#432", "#653")}
VERSIONS = {"onestep": "0.1.0", "comfy-core": "0.29.0"}


@dataclass
class Box:
    """A node: its class, its inputs (a pair is a link: name of a Box and the number of its output), how it looks."""

    kind: str
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    height: int | None = None
    prompt: bool = False
    models: list[dict[str, str]] = field(default_factory=list)
    """files it needs, for ComfyUI's missing-models dialog: name, url, directory"""


@dataclass
class Described:
    """A workflow. columns: names and boxes from left to right, each from top to bottom; the note is left of them."""

    title: str
    note: str
    columns: list[dict[str, Box]]
    widths: list[int]
    note_size: tuple[int, int] = (290, 560)

    @property
    def boxes(self) -> dict[str, Box]:
        return {name: box for column in self.columns for name, box in column.items()}


def draw(name: str, described: Described, info: dict) -> dict[str, Any]:
    """info: ComfyUI's /object_info. Raises KeyError for a class or an input that it does not know."""
    note = {
        "id": 1, "type": "MarkdownNote", "pos": [0, 0], "size": list(described.note_size), "flags": {}, "order": 0,
        "mode": 0, "inputs": [], "outputs": [], "properties": {}, "title": "Read me",
        "widgets_values": [f"## {described.title}\n\n{unwrapped(described.note)}"],
    }  # fmt: skip
    note |= dict(zip(("color", "bgcolor"), COLOURS["note"]))
    ids = {key: i for i, key in enumerate(described.boxes, 2)}
    nodes, links, x = [note], [], described.note_size[0] + BESIDE
    outgoing: dict[tuple[str, int], list[int]] = {}
    for width, column in zip(described.widths, described.columns, strict=True):
        y = 0
        for key, box in column.items():
            drawn = node(ids[key], box, info[box.kind], (x, y), width)
            for slot, entry in enumerate(drawn["inputs"]):
                source, output = box.inputs[entry["name"]]
                kind = info[described.boxes[source].kind]["output"][output]
                links.append([len(links) + 1, ids[source], output, ids[key], slot, named(kind)])
                entry["link"] = len(links)
                outgoing.setdefault((source, output), []).append(len(links))
            nodes.append(drawn)
            y += drawn["size"][1] + PREVIEWS.get(box.kind, 0) + GAP
        x += width + BESIDE
    for key in described.boxes:
        for slot, output in enumerate(nodes[ids[key] - 1]["outputs"]):
            output["links"] = outgoing.get((key, slot), [])
    right = x - BESIDE
    bottom = max(n["pos"][1] + n["size"][1] + PREVIEWS.get(n["type"], 0) for n in nodes)
    scale = int(100 * min(1.0, SCREEN[0] / right, SCREEN[1] / (bottom + TITLE))) / 100
    if scale < LEAST:
        raise ValueError(f"{name}: {right} x {bottom + TITLE} is too large for the screen")
    offset = [round(CORNER[0] / scale), round(CORNER[1] / scale) + TITLE]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"onestep/{name}")), "revision": 0, "last_node_id": len(nodes),
        "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [], "config": {},
        "extra": {"ds": {"scale": scale, "offset": offset}}, "version": 0.4,
    }  # fmt: skip


def unwrapped(text: str) -> str:
    """Paragraphs and points on a line each: the page breaks a note's lines where they end."""
    return re.sub(r"(?<!\n)\n(?![\n-])", " ", text.strip())


def node(number: int, box: Box, schema: dict, corner: tuple[int, int], width: int) -> dict[str, Any]:
    """One node as the page stores it; its inputs are those that are linked."""
    inputs, values, rows, tall = [], [], 0, 0
    known = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
    if unknown := box.inputs.keys() - known.keys():
        raise KeyError(f"{box.kind} has no input {', '.join(unknown)}")
    sockets = 0
    for name, (kind, *options) in known.items():
        options = (options or [{}])[0]
        widget = is_widget(kind, options)
        linked = isinstance(box.inputs.get(name), tuple)
        if linked:
            entry = {"name": name, "type": named(kind), "link": None}
            inputs.append(entry | ({"widget": {"name": name}} if widget else {}))
        if not widget:
            sockets += 1
            continue
        rows, tall = rows + 1, tall + bool(options.get("multiline"))
        value = box.inputs.get(name)
        if linked and named(kind) == "COMBO":
            values.append("")  # its choices may be this machine's files
        else:
            values.append(default(kind, options) if linked or value is None else value)
        if options.get("control_after_generate"):
            values.append("fixed")
            rows += 1
    outputs = [
        {"name": n, "type": named(kind), "links": []} for n, kind in zip(schema["output_name"], schema["output"])
    ]
    height = 16 + 24 * max(sockets, len(outputs)) + 28 * rows + 60 * tall + SAID.get(box.kind, 0)
    pack = "onestep" if box.kind.startswith("OneStep") else "comfy-core"
    properties = {"cnr_id": pack, "ver": VERSIONS[pack], "Node name for S&R": box.kind}
    drawn = {
        "id": number, "type": box.kind, "pos": list(corner), "size": [width, box.height or height], "flags": {},
        "order": number - 1, "mode": 0, "inputs": inputs, "outputs": outputs,
        "properties": properties | ({"models": box.models} if box.models else {}), "widgets_values": values,
    }  # fmt: skip
    drawn |= {"title": box.title} if box.title else {}
    return drawn | (dict(zip(("color", "bgcolor"), COLOURS["prompt"])) if box.prompt else {})


def is_widget(kind: Any, options: dict) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def named(kind: Any) -> str:
    """A type as links name it."""
    return "COMBO" if isinstance(kind, list) else kind


def default(kind: Any, options: dict) -> Any:
    """What a widget shows before anyone touches it."""
    choices = kind if isinstance(kind, list) else options.get("options")
    return options.get("default", choices[0] if choices else {"STRING": "", "BOOLEAN": False}.get(kind, 0))
