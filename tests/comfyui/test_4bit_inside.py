"""Quantized models in ComfyUI's own objects: each check of inside_*.py is a test here."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import tiny
from server import PACK, environment

from distill.backbones.skeleton import skeleton
from distill.header import read_header
from distill.layouts import UNET, unet_to_ldm

INSIDE = PACK / "tests/comfyui/inside.py"
MODULES = sorted(INSIDE.parent.glob("inside_*.py"))
CHECKS = [name for m in MODULES for name in re.findall(r"^def (check_\w+)", m.read_text("utf-8"), re.M)]


def sd15() -> dict[str, list[int]]:
    """Names and shapes of Stable Diffusion 1.5's U-Net in a OneStep file; diffusers' defaults but one."""
    from diffusers import UNet2DConditionModel

    net = skeleton(lambda: UNet2DConditionModel(cross_attention_dim=768))
    return {UNET + k: list(v.shape) for k, v in unet_to_ldm(net.state_dict(), net.config).items()}


@pytest.fixture(scope="module")
def results(comfyui, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("inside")
    header = read_header(tiny.write(folder / "student.safetensors"))
    shapes = {"tiny": {k: v["shape"] for k, v in header.items() if k != "__metadata__"}, "sd15": sd15()}
    (folder / "shapes.json").write_text(json.dumps(shapes))
    command = [comfyui[1], str(INSIDE), str(folder / "results.json"), str(folder)]
    done = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=900)
    assert (folder / "results.json").is_file(), (done.stdout + done.stderr)[-5000:]
    return json.loads((folder / "results.json").read_text())


def test_no_check_hides_another():
    assert CHECKS and len(CHECKS) == len(set(CHECKS))


@pytest.mark.parametrize("check", CHECKS)
def test_inside(results, check):
    assert results[check] == "", results[check]
