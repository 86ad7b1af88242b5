"""OneStep in ComfyUI: one-step distilled and 4-bit quantized diffusion models as native MODEL, CLIP and VAE.

ComfyUI imports this folder as a package and calls `comfy_entrypoint`. Whatever else imports it (pytest does) gets an
empty module.
"""

import logging
import re
from importlib.util import find_spec

OLDEST = "0.12.0"  # ComfyUI's; pyproject.toml says the same to its registry


def comfyui_version() -> str:
    """The running ComfyUI's; "0" where it is too old to say."""
    if not find_spec("comfyui_version"):
        return "0"
    from comfyui_version import __version__

    return __version__


def is_older(version: str, than: str) -> bool:
    first, second = (tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (version, than))
    return first < second


if find_spec("folder_paths"):  # a module that only ComfyUI has
    if is_older(comfyui_version(), OLDEST):
        logging.error("OneStep needs ComfyUI %s or later, and this is %s: update ComfyUI.", OLDEST, comfyui_version())
        NODE_CLASS_MAPPINGS = {}  # an empty pack: ComfyUI asks for nothing more
    else:
        from comfy_api.latest import ComfyExtension

        from .nodes import NODES

        WEB_DIRECTORY = "./web"  # web/docs/<node id>.md is the node's help page

        class OneStepExtension(ComfyExtension):
            """The pack, as ComfyUI asks for it."""

            async def get_node_list(self) -> list[type]:
                return NODES

        async def comfy_entrypoint() -> OneStepExtension:
            return OneStepExtension()
