"""This interpreter as a ComfyUI on the CPU, and this repository as the package `pack`. Import it before any of comfy.

Scripts that ComfyUI's interpreter runs begin with it; ARGUMENTS is what they were called with.
"""

import importlib
import sys
import types
from pathlib import Path

PACK = Path(__file__).absolute().parents[2]
ARGUMENTS = sys.argv[1:]
sys.path.insert(0, ".")
sys.argv = ["main.py"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True
sys.modules["pack"] = package = types.ModuleType("pack")  # as ComfyUI does: a folder as a package of another name
package.__path__ = [str(PACK)]

import torch  # noqa: E402

torch.set_grad_enabled(False)


def imported(name: str):
    return importlib.import_module("pack." + name)
