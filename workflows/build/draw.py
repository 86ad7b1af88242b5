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


@dataclass(frozen=True)
class Asked:
    """An inner widget that a blueprint's node shows: its value until someone changes it, and another name for it."""

    value: Any
    label: str | None = None


def draw(name: str, described: Described, info: dict) -> dict[str, Any]:
    """info: ComfyUI's /object_info. Raises KeyError for a class or an input that it does not know."""
    note = {
        "id": 1, "type": "MarkdownNote", "pos": [0, 0], "size": list(described.note_size), "flags": {}, "order": 0,
        "mode": 0, "inputs": [], "outputs": [], "properties": {}, "title": "Read me",
        "widgets_values": [f"## {described.title}\n\n{unwrapped(described.note)}"],
    }  # fmt: skip
    note |= dict(zip(("color", "bgcolor"), COLOURS["note"]))
    left = described.note_size[0] + BESIDE
    nodes, links, right = placed(described.columns, described.widths, info, first=2, left=left)
    nodes = [note, *nodes]
    bottom = max(n["pos"][1] + n["size"][1] + PREVIEWS.get(n["type"], 0) for n in nodes)
    scale = int(100 * min(1.0, SCREEN[0] / right, SCREEN[1] / (bottom + TITLE))) / 100
    if scale < LEAST:
        raise ValueError(f"{name}: {right} x {bottom + TITLE} is too large for the screen")
    offset = [round(CORNER[0] / scale), round(CORNER[1] / scale) + TITLE]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"onestep/{name}")), "revision": 0, "last_node_id": len(nodes),
        "last_link_id": len(links), "nodes": nodes, "links": [list(link) for link in links], "groups": [],
        "config": {}, "extra": {"ds": {"scale": scale, "offset": offset}}, "version": 0.4,
    }  # fmt: skip


Link = tuple[int, int, int, int, int, str]
"""its number; node and output it comes from; node and input it goes to; type"""


def placed(
    columns: list[dict[str, Box]], widths: list[int], info: dict, first: int, left: int
) -> tuple[list[dict[str, Any]], list[Link], int]:
    """Boxes in columns -> (their nodes, numbered from `first` on, the links between them, where the last one ends)."""
    boxes = {name: box for column in columns for name, box in column.items()}
    ids = {name: i for i, name in enumerate(boxes, first)}
    nodes: list[dict[str, Any]] = []
    links: list[Link] = []
    for width, column in zip(widths, columns, strict=True):
        y = 0
        for name, box in column.items():
            drawn = node(ids[name], box, info[box.kind], (left, y), width)
            for slot, entry in enumerate(drawn["inputs"]):
                if isinstance(box.inputs[entry["name"]], Asked):
                    continue
                source, output = box.inputs[entry["name"]]
                kind = named(info[boxes[source].kind]["output"][output])
                entry["link"] = len(links) + 1
                links.append((len(links) + 1, ids[source], output, ids[name], slot, kind))
            nodes.append(drawn)
            y += drawn["size"][1] + PREVIEWS.get(box.kind, 0) + GAP
        left += width + BESIDE
    for number, source, output, *_ in links:
        nodes[source - first]["outputs"][output]["links"].append(number)
    return nodes, links, left - BESIDE


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
        value = box.inputs.get(name)
        linked, asked = isinstance(value, tuple), isinstance(value, Asked)
        if linked or asked:
            entry = {"name": name, "type": named(kind), "link": None}
            inputs.append(entry | ({"widget": {"name": name}} if widget else {}))
        if not widget:
            sockets += 1
            continue
        rows, tall = rows + 1, tall + bool(options.get("multiline"))
        if linked and named(kind) == "COMBO":
            values.append("")  # its choices may be this machine's files
        else:
            given = value.value if asked else value
            values.append(default(kind, options) if linked or value is None else given)
        if options.get("control_after_generate") or name == "seed":  # the page gives every seed this widget
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
