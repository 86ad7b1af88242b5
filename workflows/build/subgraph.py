"""A graph described in Python -> a subgraph blueprint: one node of ComfyUI's node library with the graph inside."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from draw import VERSIONS, Asked, Box, placed

INPUT, OUTPUT = -10, -20
"""what ComfyUI calls the two ends of a subgraph"""
ROW, END = 20, 120  # pixels: between an end's slots, and its width


@dataclass
class Blueprint:
    """columns: as of a workflow; those of a box's inputs that are Asked are the node's. outputs: what it gives by name:
    a box's name, and the number of its output."""

    about: str
    columns: list[dict[str, Box]]
    widths: list[int]
    outputs: dict[str, tuple[str, int]]
    size: tuple[int, int]
    """of the closed node, in pixels"""


def draw_blueprint(name: str, blueprint: Blueprint, info: dict) -> dict[str, Any]:
    """info: ComfyUI's /object_info. Raises KeyError for a class or an input that it does not know."""
    identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"onestep/blueprint/{name}"))
    left = END + 2 * ROW
    nodes, links, right = placed(blueprint.columns, blueprint.widths, info, first=1, left=left)
    links = [dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), k)) for k in links]
    inputs, shown = asked(blueprint, nodes, links)
    outputs = given(blueprint, nodes, links, right + 2 * ROW)
    subgraph = {
        "id": identity, "version": 1, "revision": 0, "config": {}, "name": name, "category": "OneStep",
        "description": blueprint.about, "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links),
        "lastRerouteId": 0}, "inputNode": {"id": INPUT, "bounding": [0, 0, END, ROW * (len(inputs) + 2)]},
        "outputNode": {"id": OUTPUT, "bounding": [right + 2 * ROW, 0, END, ROW * (len(outputs) + 2)]},
        "inputs": inputs, "outputs": outputs, "widgets": [], "nodes": nodes, "groups": [], "links": links, "extra": {},
    }  # fmt: skip
    node = {
        "id": len(nodes) + 1, "type": identity, "pos": [0, 0], "size": list(blueprint.size), "flags": {}, "order": 0,
        "mode": 0, "title": name, "widgets_values": [],
        "inputs": [slot(i, link=None) | {"widget": {"name": i["name"]}} for i in inputs],
        "outputs": [slot(o, links=[]) for o in outputs],
        "properties": {"proxyWidgets": shown, "cnr_id": "onestep", "ver": VERSIONS["onestep"]},
    }  # fmt: skip
    return {
        "revision": 0, "last_node_id": node["id"], "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
    }  # fmt: skip


def asked(blueprint: Blueprint, nodes: list[dict], links: list[dict]) -> tuple[list[dict], list[list[str]]]:
    """(the subgraph's inputs, the inner widgets that its node shows); links them inside."""
    inputs, shown = [], []
    for node, box in zip(nodes, (box for column in blueprint.columns for box in column.values())):
        for target, entry in enumerate(node["inputs"]):
            value = box.inputs[entry["name"]]
            if not isinstance(value, Asked):
                continue
            entry["link"] = connect(links, (INPUT, len(inputs)), (node["id"], target), entry["type"])
            inputs.append(end(entry["name"], entry["type"], entry["link"], len(inputs), END - ROW))
            inputs[-1] |= {"label": value.label} if value.label else {}
            shown.append([str(node["id"]), entry["name"]])
            if "seed" in entry["name"]:
                shown.append([str(node["id"]), "control_after_generate"])
    return inputs, shown


def given(blueprint: Blueprint, nodes: list[dict], links: list[dict], x: int) -> list[dict]:
    """The subgraph's outputs; links them inside."""
    ids = {name: n["id"] for name, n in zip((name for column in blueprint.columns for name in column), nodes)}
    outputs = []
    for name, (source, number) in blueprint.outputs.items():
        output = nodes[ids[source] - 1]["outputs"][number]
        link = connect(links, (ids[source], number), (OUTPUT, len(outputs)), output["type"])
        output["links"].append(link)
        outputs.append(end(name, output["type"], link, len(outputs), x + ROW))
    return outputs


def connect(links: list[dict], origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
    """Append a link -> its number."""
    ends = {"origin_id": origin[0], "origin_slot": origin[1], "target_id": target[0], "target_slot": target[1]}
    links.append({"id": len(links) + 1} | ends | {"type": kind})
    return len(links)


def end(name: str, kind: str, link: int, row: int, x: int) -> dict[str, Any]:
    """A slot of a subgraph's end."""
    identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"onestep/slot/{name}/{row}/{link}"))
    return {"id": identity, "name": name, "type": kind, "linkIds": [link], "pos": [x, ROW * (row + 1)]}


def slot(end: dict, **more: Any) -> dict[str, Any]:
    """The same slot on the closed node."""
    return {k: end[k] for k in ("name", "type", "label") if k in end} | more
