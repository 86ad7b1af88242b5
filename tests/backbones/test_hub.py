"""Models of the Hugging Face hub by their names, on a machine that has no network."""

import os
import subprocess
import sys

import pytest
import tiny

from distill.backbones.folder import is_hub_name

OPEN = """
import sys
from distill.backbones import load
from distill.header import CheckpointError
for name in sys.argv[1:]:
    try:
        model = load(name)
        print(model.name, model.meta.prediction, model.shape(1))
    except CheckpointError as e:
        print(e)
"""


@pytest.mark.parametrize(
    "name, is_one",
    [("org/model-1.5_x", True), ("org/a.safetensors", False), ("org/a.gguf", False), ("a", False), ("/a/b", False),
     ("a/b/c", False), ("here/model", False)],
)  # fmt: skip
def test_what_is_a_name(tmp_path, monkeypatch, name, is_one):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/model").mkdir(parents=True)
    assert is_hub_name(name) == is_one


def test_names_are_found_in_the_cache_and_told_where_they_are_not(tmp_path):
    commit = "0" * 40
    model = tmp_path / "hub" / "models--org--tiny"
    tiny.stable_diffusion(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", OPEN, "org/tiny", "org/other"], env=env, capture_output=True, text=True, check=True
    )
    found, missing = ran.stdout.splitlines()
    assert found == "org/tiny eps (1, 4, 8, 8)"
    assert missing.startswith("org/other: no such file or folder here, and not to be had from the Hugging Face hub (")
    assert "Offline: put the model's diffusers folder" in missing
