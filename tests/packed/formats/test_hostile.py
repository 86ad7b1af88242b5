"""Files that are damaged, or want harm: an error naming the file, and nothing else. Nothing runs, crashes or swells."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from distill.header import CheckpointError, read_header
from distill.packed.formats import check, read
from distill.packed.weight import QuantizedWeight


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, start: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


def gguf(*infos: bytes, values: tuple[bytes, ...] = (), data: int = 64, version: int = 3, counts=None) -> bytes:
    counts = counts or (len(infos), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


def value(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def quantized() -> dict[str, torch.Tensor]:
    codes = torch.arange(-64, 64).to(torch.int8).view(4, 32)
    return QuantizedWeight(codes, torch.ones(2, 4), torch.ones(2, 4), (4, 64)).to_tensors("y")


def without(**changes) -> bytes:
    """Our layer with some entries changed (None: dropped)."""
    tensors = quantized()
    for name, new in changes.items():
        tensors.pop(f"y.{name}") if new is None else tensors.update({f"y.{name}": new})
    return save(tensors)


def mark(spec: object) -> torch.Tensor:
    raw = spec if isinstance(spec, bytes) else json.dumps(spec).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


def nf4(**changes) -> bytes:
    spec = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64]} | changes.pop("spec", {})
    tensors = {
        "weight": torch.zeros(64, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(2),
        "weight.quant_map": torch.ones(16),
        "weight.quant_state.bitsandbytes__nf4": mark(spec),
    }
    tensors |= changes
    return save({f"y.{k}": v for k, v in tensors.items() if v is not None})


class Bomb:
    """Unpickling this writes a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def archive(folder: Path) -> bytes:
    path = folder / "zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("data.pkl", pickle.dumps(Bomb()))
        z.writestr("zeros", bytes(1 << 26))
    return path.read_bytes()


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DEEP = b"[" * 200_000
GROUP = {"format": "awq_w4a16", "group_size": 32, "orig_shape": [4, 64]}
CASES = {
    # neither safetensors nor GGUF
    "empty": (b"", "not a safetensors file"),
    "random bytes": (random.Random(1).randbytes(1000), "not a safetensors file"),
    "zip bomb with a pickle": (archive, "zip archive"),
    "pickle": (pickle.dumps(Bomb()), "pickle"),
    "old pickle": (pickle.dumps(Bomb(), protocol=0), "not a safetensors file"),
    "web page": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    # safetensors' header
    "header longer than file": (safetensors({"a": F32}, length=10**6), "truncated"),
    "header of 2^63": (safetensors({"a": F32}, length=2**63), "not a safetensors file"),
    "data cut": (safetensors({"a": F32}, bytes(15)), "truncated"),
    "deep JSON": (safetensors(b'{"a":' + DEEP), "not JSON"),
    "list for a header": (safetensors(b"[{}]" + b" " * 20), "not a safetensors file"),
    "no offsets": (safetensors({"a": {"dtype": "F32", "shape": [4]}}, bytes(16)), "damaged"),
    "negative offsets": (safetensors({"a": F32 | {"data_offsets": [-16, 0]}}, bytes(16)), "damaged"),
    "overlap": (safetensors({"a": F32, "b": F32 | {"data_offsets": [8, 24]}}, bytes(24)), "damaged"),
    "wrong shape": (safetensors({"a": F32 | {"shape": [5]}}, bytes(16)), "damaged"),
    "shape that overflows": (safetensors({"a": F32 | {"shape": [2**62, 4]}}, bytes(16)), "damaged"),
    "unknown dtype": (safetensors({"a": F32 | {"dtype": "Z9"}}, bytes(16)), "damaged"),
    "metadata that is no text": (safetensors({"a": F32, "__metadata__": {"x": [1]}}, bytes(16)), "damaged"),
    # our layers, and stock ones
    "mark of deep JSON": (without(comfy_quant=mark(DEEP[:60_000])), "layer y: its comfy_quant"),
    "unknown format": (without(comfy_quant=mark({"format": "w1a1"})), "layer y has the unknown format 'w1a1'"),
    "no scale": (without(weight_scale=None), "layer y: weight or weight_scale is missing"),
    "no weight": (without(weight=None), "layer y: weight or weight_scale is missing"),
    "stock without weight": (
        save({"y.comfy_quant": mark({"format": "nvfp4"}), "x": torch.ones(1)}),
        "layer y has no weight",
    ),
    "scale of another shape": (without(weight_scale=torch.ones(3, 4)), r"weight_scale is \(3, 4\), not \(2, 4\)"),
    "group of 0": (without(comfy_quant=mark(GROUP | {"group_size": 0})), "group_size 0"),
    "group of text": (without(comfy_quant=mark(GROUP | {"group_size": "64"})), "group_size '64'"),
    "huge shape": (without(comfy_quant=mark(GROUP | {"orig_shape": [2**40, 64]})), "orig_shape"),
    "negative shape": (without(comfy_quant=mark(GROUP | {"orig_shape": [-4, -64]})), "orig_shape"),
    "codes of float": (without(weight=torch.ones(4, 32)), "weight is torch.float32"),
    "17 bits": (without(comfy_quant=mark(GROUP | {"bits": 17})), "17 bits"),
    "layers in bad metadata": (save({"x": torch.ones(1)}, {"_quantization_metadata": "[]"}), "_quantization_metadata"),
    # bitsandbytes
    "nf4 of deep JSON": (
        nf4(**{"weight.quant_state.bitsandbytes__nf4": mark(DEEP[:60_000])}),
        "quant_state is not JSON",
    ),
    "nf4 of huge shape": (nf4(spec={"shape": [2**30, 2**30]}), "its shape is"),
    "nf4 of another shape": (nf4(spec={"shape": [2, 128]}), "64 bytes and blocks of 64"),
    "nf4 of blocks of 0": (nf4(spec={"blocksize": 0}), "blocksize is 0"),
    "nf4 without scales": (nf4(**{"weight.absmax": None}), "absmax is missing"),
    "nf4 without weight": (nf4(weight=None), "quant_state and no weight"),
    "nf4 with a short map": (nf4(**{"weight.quant_map": torch.ones(15)}), "quant_map is not 16 numbers"),
    "nf4 with an offset that no float is": (
        nf4(
            spec={"nested_offset": 10**400},
            **{"weight.absmax": torch.ones(2, dtype=torch.uint8), "weight.nested_absmax": torch.ones(1)},
            **{"weight.nested_quant_map": torch.ones(256)},
        ),
        "nested_offset 1000",
    ),
    "nf4 with half its nesting": (nf4(**{"weight.absmax": torch.ones(2, dtype=torch.uint8)}), "nested scales are"),
    # GGUF
    "gguf of four bytes": (b"GGUF", "its header wants 4 bytes"),
    "gguf of version 9": (gguf(version=9), "GGUF version 9"),
    "gguf counting tensors": (gguf(counts=(2**60, 0)), "its header counts 1152921504606846976 tensors"),
    "gguf counting values": (gguf(counts=(0, 2**63)), "its header counts"),
    "gguf with a million tensors": (gguf(counts=(10**6, 0)), "its header counts 1000000 tensors"),
    "gguf with a string of 2^63": (gguf(values=(struct.pack("<Q", 2**63),)), "a string of 9223372036854775808 bytes"),
    "gguf array of 2^60": (gguf(values=(value("a", 9, struct.pack("<IQ", 4, 2**60)),)), "its header wants"),
    "gguf array of texts": (gguf(values=(value("a", 9, struct.pack("<IQ", 8, 2**60)),)), "an array of 11529215"),
    "gguf array of many texts": (
        gguf(values=(value("a", 9, struct.pack("<IQ", 8, 1 << 21)),), data=1 << 24),
        "an array of 2097152 values",
    ),
    "gguf array of arrays": (gguf(values=(value("a", 9, struct.pack("<IQ", 9, 1) * 999),)), "a value of type 9"),
    "gguf value of type 99": (gguf(values=(value("a", 99, b""),)), "a value of type 99"),
    "gguf alignment 3": (gguf(values=(value("general.alignment", 4, struct.pack("<I", 3)),)), "alignment is 3"),
    "gguf alignment text": (gguf(values=(value("general.alignment", 8, text("32")),)), "alignment is '32'"),
    "gguf ggml type 16": (gguf(tensor("a", (32,), 16, 0)), "tensor 'a' has ggml type 16"),
    "gguf 2^31 dimensions": (gguf(text("a") + struct.pack("<IQ", 2**31, 1)), "2147483648 dimensions"),
    "gguf huge tensor": (gguf(tensor("a", (2**32, 2**32), 0, 0)), "tensor 'a' is F32 of shape"),
    "gguf empty dimension": (gguf(tensor("a", (2**63, 0), 0, 0)), "tensor 'a' is F32 of shape"),
    "gguf broken block": (gguf(tensor("a", (33,), 2, 0)), "tensor 'a' is Q4_0 of shape"),
    "gguf past its end": (gguf(tensor("a", (16,), 0, 32)), "truncated or damaged: tensor 'a'"),
    "gguf offset of 2^64": (gguf(tensor("a", (4,), 0, 2**64 - 32)), "truncated or damaged: tensor 'a'"),
    "gguf overlap": (gguf(tensor("a", (16,), 0, 0), tensor("b", (4,), 0, 32)), "'a' and 'b' overlap"),
    "gguf same names": (gguf(tensor("a", (4,), 0, 0), tensor("a", (4,), 0, 32)), "one name"),
    "gguf false shape": (
        gguf(
            tensor("a", (16,), 0, 0),
            values=(value("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ2i", 5, 2, 2**20, 2**20)),),
        ),
        "orig_shape",
    ),
    "gguf posing as our layer": (
        gguf(tensor("a.weight", (32, 1), 2, 0), tensor("a.weight_scale", (4,), 0, 32)),
        "layer a: weight_scale is",
    ),
}


@contextmanager
def little_room(size: int = 64 << 20, seconds: int = 30):
    """Asking for more memory than this fails inside, and so does what does not end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None

    def stop(signum, frame):
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def test_there_is_little_room():
    with little_room(), pytest.raises(RuntimeError, match="memory|allocate"):
        torch.empty(1 << 30, dtype=torch.uint8)
    with pytest.raises(TimeoutError), little_room(seconds=1):
        while True:
            pass


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, problem = CASES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content(tmp_path) if callable(content) else content)
    with little_room(), pytest.raises(CheckpointError, match=problem) as e:
        read(path)
    line = str(e.value).splitlines()[0]
    assert line.startswith(str(path)) and line.endswith(".") and len(line) < 600
    assert not Path("executed").exists()


MANY = 2_500_000


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"a":{"dtype":"F32","shape":[' + "1," * MANY + '1],"data_offsets":[0,4]}}', "more entries than any model"),
        ('{"__metadata__":{' + '"":"",' * (MANY // 2) + '"":""}}', "more entries than any model"),
        ('{"a":' + "[" * MANY, "more entries than any model"),
        (json.dumps({"__metadata__": {"text": '[1, "a\\"], ' * MANY}}), None),
        (json.dumps({"a": F32 | {"shape": [10**4000] * 1000}}), "not a table of tensors"),
        (json.dumps({"a": F32 | {"shape": [2**62] * 64}}), "not a table of tensors"),
        (json.dumps({"a": F32 | {"shape": [1] * 65}}), "not a table of tensors"),
    ],
    ids=["numbers", "strings", "lists", "a long text", "endless numbers", "numbers to multiply", "dimensions"],
)
def test_a_header_is_bounded_before_anything_is_made_of_it(tmp_path, text, problem):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(text.encode(), bytes(16)))
    if problem is None:
        assert len(read_header(path)["__metadata__"]["text"]) > MANY
        return
    with pytest.raises(CheckpointError, match=problem):
        read_header(path)


def test_missing_folder_and_unreadable(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="no such file"):
            read(path)
    locked = tmp_path / "locked"
    locked.write_bytes(b"x")
    locked.chmod(0)
    if os.access(locked, os.R_OK):
        pytest.skip("running as root: every file opens")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read(locked)


SOUND = {
    "ours": save(quantized() | {"x.weight": torch.ones(3, 5)}, {"a": "b"}),
    "nf4": nf4(),
    "gguf": gguf(
        tensor("a.weight", (32, 4), 2, 0),
        tensor("b.weight", (16,), 0, 96),
        tensor("c.weight", (256, 1), 12, 160),
        values=(
            value("general.architecture", 8, text("flux")),
            value("comfy.gguf.orig_shape.c.weight", 9, struct.pack("<IQ2i", 5, 2, 8, 32)),
        ),
        data=320,
    ),
}


@pytest.mark.parametrize("kind", SOUND)
def test_fuzzed(tmp_path, kind):
    """A thousand damaged copies: each reads, or is refused by name. Deterministic."""
    rng, sound = random.Random(kind), SOUND[kind]
    path, refused = tmp_path / "m", 0
    path.write_bytes(sound)
    read(path)
    for _ in range(1000):
        raw = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if rng.random() < 0.3:
            del raw[rng.randrange(len(raw)) :]
        path.write_bytes(raw)
        try:
            with little_room():
                check(path)
                loaded = read(path)
        except CheckpointError as e:
            assert str(e).startswith(str(path))
            refused += 1
        else:
            assert all(isinstance(t, torch.Tensor) for t in loaded.weights.values())
    assert refused > 100


def test_what_a_file_says_is_not_quoted_without_end(tmp_path):
    header = json.dumps({"a": {"dtype": "x" * 5000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError) as e:
        read(path)
    assert len(str(e.value)) < 600 and str(e.value).endswith("Download it again.")
