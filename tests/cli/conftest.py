"""A careless user's folder, and the door of the command line."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from distill.cli import main


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with things that are no models, prompts or pictures."""
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("Blåbär".encode("latin-1"))
    Path("empty.txt").write_text("\n \n")
    Path("prompts.txt").write_text("a red ring\na blue square\n")
    Path("old.json").write_text("{}")
    Path("folder").mkdir()
    Path("folder.json").mkdir()
    Path("folder.png").mkdir()
    Path("zero.safetensors").write_bytes(b"")
    save_file({"a.weight": torch.ones(4, 4)}, "plain.safetensors", {"made_by": "somebody"})
    tiny.write("foreign.safetensors", method="teacher", steps=2, guidance={"scale": 2.0, "baked": False})
    return tmp_path


@pytest.fixture
def door(capsys):
    """door(*words) -> (exit code, stdout, stderr) of the command line."""

    def call(*words):
        capsys.readouterr()
        try:
            code = main([str(w) for w in words])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call
