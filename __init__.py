"""OneStep in ComfyUI: one-step distilled and 4-bit quantized diffusion models as native MODEL, CLIP and VAE.

ComfyUI imports this folder as a package and calls `comfy_entrypoint`. Whatever else imports it (pytest does) gets an
empty module.
"""

from importlib.util import find_spec

if find_spec("folder_paths"):  # a module that only ComfyUI has
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    WEB_DIRECTORY = "./web"  # web/docs/<node id>.md is the node's help page

    class OneStepExtension(ComfyExtension):
        async def get_node_list(self):
            return NODES

    async def comfy_entrypoint() -> OneStepExtension:
        return OneStepExtension()
