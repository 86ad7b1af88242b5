"""A file is data in ComfyUI too: hundreds of damaged OneStep files load and sample, or are refused by name."""

import json
import subprocess

import mutants
import tiny
import torch
from server import PACK, environment

from distill.quantize.run import Quantize, quantize_file

COUNT = 400


def test_damaged_files(comfyui, tmp_path):
    dense = tiny.write(tmp_path / "student.safetensors", torch.float16, **mutants.SMALL)
    quantize_file(dense, tmp_path / "packed.safetensors", Quantize(method="rtn"))
    out = tmp_path / "results.json"
    command = [comfyui[1], str(PACK / "tests/comfyui/damaged_inside.py"), str(out), str(tmp_path), str(COUNT)]
    done = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=600)
    assert out.is_file(), (done.stdout + done.stderr)[-5000:]
    found = json.loads(out.read_text())
    assert "error" not in found, found["error"]
    assert found["refused"] + found["pictures"] == COUNT and min(found.values()) > COUNT / 50, found
