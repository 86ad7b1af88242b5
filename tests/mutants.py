"""Damaged and hostile copies of a OneStep file. `choose(list)` picks: hypothesis' draws, or a seeded random.choice."""

from __future__ import annotations

import faulthandler
import json
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

Choose = Callable[[list], Any]
NASTY = [
    None, True, False, 0, 1, 2, -1, 3, 7, 33, 1000, 65_536, 10**5, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**9), 0.0,
    0.5, 1e-9, 1e9, 1e300, -1.5, "", "x", "1", "\u00b2", "silu", "patch", "eps", "flow", "edm", "trig", "ddpm",
    "linear", "x" * 300, [], [0], [1, 2], [32], [["a"]], {}, {"kind": "edm"}, {"a": {"a": {}}}, [1] * 1000,
]  # fmt: skip
RAW = [
    "",
    "{",
    "[]",
    "null",
    "NaN",
    "Infinity",
    "1" * 5000,
    "[" * 100_000,
    '{"a":' * 50_000,
    "\u00b2",
    "-1",
    '"',
    "{}",
    "0",
]
SMALL = {
    "unet": {
        "block_out_channels": (32, 32), "cross_attention_dim": 32, "projection_class_embeddings_input_dim": 32,
        "layers_per_block": 1, "attention_head_dim": 2,
    },
    "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
}  # fmt: skip
"""tiny.write's arguments for a file that is quick to write and to open"""
MEMORY = 500 << 20
"""what a damaged file may take beyond a sound one, in bytes"""
KEYS = ["", "x", "type", "kind", "shift", "_attn_implementation", "attn_implementation", "num_layers", "x" * 300]


class File(NamedTuple):
    """A safetensors file in pieces: its header, as JSON, and the bytes behind it."""

    header: dict[str, Any]
    data: bytes

    @classmethod
    def read(cls, path: Path) -> File:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        return cls(json.loads(raw[8 : 8 + length]), raw[8 + length :])

    def write(self, path: Path, text: bytes | None = None) -> Path:
        text = text or json.dumps(self.header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + self.data)
        return path


def inside(tree: Any, choose: Choose) -> tuple[Any, Any] | None:
    """(container, key) of some place in a tree, as likely near the root as in the thick of it."""
    place = None
    while isinstance(tree, dict | list) and tree and (place is None or choose([0, 1, 1])):
        key = choose(sorted(tree) if isinstance(tree, dict) else list(range(len(tree))))
        place, tree = (tree, key), tree[key]
    return place


def change(tree: Any, choose: Choose) -> None:
    """Something in the tree becomes something else, disappears, doubles, or gets company."""
    if (place := inside(tree, choose)) is None:
        return
    container, key = place
    old, how = container[key], choose(["value", "value", "value", "near", "near", "drop", "add"])
    if how == "near" and type(old) in (int, float):
        container[key] = choose([old + 1, old - 1, -old, old * 2, old * 1000, old * 10**9, float(old), str(old)])
    elif how == "near" and isinstance(old, list):
        container[key] = choose([old + old, old[:-1], old * 1000, tuple(old)])
    elif how == "drop":
        del container[key]
    elif how == "add" and isinstance(old, dict):
        old[choose(KEYS)] = choose(NASTY)
    else:
        container[key] = deepcopy(choose(NASTY))


def metadata(file: File, choose: Choose) -> File:
    """A copy with something else in its metadata."""
    header = dict(file.header)
    strings = dict(header["__metadata__"])
    for _ in range(choose([1, 1, 1, 2])):
        field = choose(sorted(strings))
        if choose([0] * 7 + [1]):
            strings[field] = choose(RAW)
            continue
        try:
            tree = {field: json.loads(strings[field])}
        except (ValueError, RecursionError):
            tree = {field: strings[field]}
        change(tree, choose)
        strings.pop(field)
        strings |= {k: v if isinstance(v, str) else json.dumps(v) for k, v in tree.items()}
    return File(header | {"__metadata__": strings}, file.data)


def entries(file: File, choose: Choose) -> File:
    """A copy with something else in its header: an entry of a tensor, or the metadata as a whole."""
    header = deepcopy(file.header)
    names = sorted(k for k in header if k != "__metadata__")
    name, how = choose(names), choose(["change", "change", "rename", "swap", "strings", "field"])
    if how == "change":
        change(header[name], choose)
    elif how == "rename":
        header[name + choose(["x", ".weight", "."])] = header.pop(name)
    elif how == "swap":
        other = choose(names)
        header[name], header[other] = header[other], header[name]
    elif how == "strings":
        header["__metadata__"] = choose(
            [None, [], {}, {"onestep.version": 1}, {"a": None}, "x", {"onestep.version": "\u00b2"}]
        )
    else:
        header["__metadata__"][choose(sorted(header["__metadata__"]))] = choose([None, 1, [], {}])
    return File(header, file.data)


def marks(file: File, choose: Choose) -> File:
    """A copy with something else in what a quantized layer says of itself."""
    name = choose(sorted(k for k in file.header if k.endswith(".comfy_quant")))
    start, end = file.header[name]["data_offsets"]
    tree = {"mark": json.loads(file.data[start:end])}
    change(tree, choose)
    raw = json.dumps(tree.get("mark")).encode()
    raw = raw.ljust(end - start)[: end - start]  # what is longer is cut, and no JSON any more
    return File(file.header, file.data[:start] + raw + file.data[end:])


def ways(dense: Path, packed: Path) -> list[tuple[Callable[[File, Choose], File], File]]:
    """What to do to which file, by how often: metadata most."""
    files = File.read(dense), File.read(packed)
    return [(metadata, files[0])] * 4 + [(entries, files[0]), (entries, files[1]), (marks, files[1])]


def limit_memory() -> None:
    """From here on this process gets no more than MEMORY. Linux."""
    import resource

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, -1))


def refused(open_and_use: Callable[[Path], None], path: Path, error: type[ValueError]) -> bool:
    """Whether a file is refused, by `error` in words a person can use. A hang ends in a traceback after a minute."""
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        open_and_use(path)
    except error as e:
        line = str(e)
        assert line.startswith(str(path)) and "\n" not in line and line.endswith(".") and len(line) < 700, line
        return True
    finally:
        faulthandler.cancel_dump_traceback_later()
    return False
