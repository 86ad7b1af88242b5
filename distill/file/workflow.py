"""The ComfyUI graph that a student's file carries: dropping the file on the canvas opens it, set up for that file.

ComfyUI's page reads "workflow" in a safetensors file's metadata, as it reads it in a picture's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "one-step-text-to-image.json"
FOLDERS = (
    Path(__file__).parents[1] / "workflows",
    Path(__file__).parents[2] / "workflows",
)  # a wheel's, the repository's
SEEN = 256  # pictures smaller than this are enlarged to be seen


def student_graph(file: str, side: int = 64, prompt: str | None = None) -> dict[str, Any] | None:
    """The graph of workflows/one-step-text-to-image.json for a student of that file name and pictures of side x side;
    None in a copy of `distill` alone, without its workflows: a student is saved all the same.

    prompt: what to ask for, of a student that does not know the tutorial's world; the note about that world goes.
    """
    source = next((path for folder in FOLDERS if (path := folder / NAME).is_file()), None)
    if source is None:
        return None
    graph = json.loads(source.read_text(encoding="utf-8"))
    if prompt is not None:
        graph["nodes"] = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    values = {"EmptyLatentImage": [side, side], "ImageScaleBy": ["nearest-exact", max(1, SEEN // side)]}
    values |= {} if prompt is None else {"CLIPTextEncode": [prompt]}
    for node in graph["nodes"]:
        first = values.get(node["type"], [])
        node["widgets_values"] = first + node.get("widgets_values", [])[len(first) :]
    return for_file(graph, file)


def for_file(graph: dict[str, Any], file: str) -> dict[str, Any]:
    """The same graph, which loads another file."""

    def named(node: dict[str, Any]) -> dict[str, Any]:
        if node["type"] != "OneStepLoadStudent":
            return node
        return node | {"widgets_values": [file, *node["widgets_values"][1:]]}

    return graph | {"nodes": [named(node) for node in graph["nodes"]]}


def renamed(text: str, file: str) -> str:
    """`for_file` of a graph as a file's metadata holds it; as it is, where that is no graph of ours."""
    try:
        return json.dumps(for_file(json.loads(text), file))
    except (ValueError, KeyError, TypeError, RecursionError):
        return text
