"""What pip installs: a wheel with the models and the workflow, which works from any folder."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_every_package_is_in_the_wheel():
    """They are listed by name, because the workflows come from another folder."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "distill").rglob("*.py")}
    assert set(listed) == found | {"distill.tutorial.assets", "distill.workflows"}


@pytest.mark.slow
def test_a_wheel_works_from_any_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "tree"], check=True)  # where building leaves its traces
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "tree"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    place = tmp_path / "elsewhere"
    place.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def run(*command):
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    distill = [sys.executable, "-m", "distill"]
    assert run(sys.executable, "-c", "import distill; print(distill.__file__)").startswith(str(tmp_path / "site"))
    assert run(*distill, "sample", "a red ring") == "samples.png\n"
    assert "SDXL-Lightning" in run(*distill, "recipes")
    assert Image.open(place / "samples.png").size == (256, 256)
    said = run(
        sys.executable,
        "-c",
        "from distill.file.workflow import *; print(json.dumps(student_graph('student.safetensors')))",
    )
    graph = json.loads(said)
    assert "student.safetensors" in [value for node in graph["nodes"] for value in node.get("widgets_values", [])]
