"""One real ComfyUI for all tests here, with tiny random models in its folders. Without a ComfyUI they skip."""

import shutil
import textwrap

import pytest
import tiny
import torch
from graphs import FOUR_BITS, quantize
from server import HINT, Client, Server, find_comfyui, find_python

MODELS = {
    "student.safetensors": {},
    "half.safetensors": {"dtype": torch.float16},
    "eps-399.safetensors": {"prediction": "eps", "t_in": 399},
    "v-399.safetensors": {"prediction": "v", "t_in": 399},
    "flow.safetensors": {"prediction": "flow", "schedule": tiny.FLOW, "t_in": 1000},
    "flow-750.safetensors": {"prediction": "flow", "schedule": tiny.FLOW, "t_in": 750},
    "few-steps.safetensors": {"steps": 4},
    "teacher.safetensors": {"method": "teacher", "steps": 5, "guidance": {"scale": 2.0, "baked": False}},
    "linear.safetensors": {"unet": {"use_linear_projection": True, "attention_head_dim": (2, 4)}},
    "kl.safetensors": {"vae": "kl"},
    "pad.safetensors": {"pad": "<other>"},
    "latent.safetensors": {"latent": tiny.LATENT | {"scale": 0.5, "shift": 0.1}},
    "foreign.safetensors": {"prediction": "eps", "t_in": 999, "schedule": tiny.DDPM | {"shift": 1.0}},
}
# Nodes that only these tests have: a MODEL as if another loader had made it of a file by any name, one during whose
# sampling the user presses Cancel, and one whose weights ComfyUI loaded again for itself.
HELPERS = """
    import sys
    from importlib import import_module
    from inspect import signature
    from pathlib import Path

    import comfy.model_management
    import folder_paths
    from comfy.patcher_extension import WrappersMP
    from comfy_api.latest import ComfyExtension, io

    class Foreign(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema("TestForeign", inputs=[io.String.Input("file")], outputs=[io.Model.Output()])

        @classmethod
        def execute(cls, file):
            pack = next(name for name in sys.modules if name.endswith("onestep-nodes"))
            path = Path(folder_paths.get_full_path("diffusion_models", "foreign.safetensors"))
            model = import_module(pack + ".nodes.native").load(path, [])[0]
            model.remove_attachments("onestep")
            return io.NodeOutput(model)

    class Cancelled(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema("TestCancelled", inputs=[io.Model.Input("model")], outputs=[io.Model.Output()])

        @classmethod
        def execute(cls, model):
            def cancel(sample, *args, **kwargs):
                comfy.model_management.interrupt_current_processing()
                return sample(*args, **kwargs)

            def never(*_):
                raise AssertionError("the network was called after Cancel")

            model = model.clone()
            model.add_wrapper(WrappersMP.SAMPLER_SAMPLE, cancel)
            model.set_model_unet_function_wrapper(never)
            return io.NodeOutput(model)

    class Reloaded(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema("TestReloaded", inputs=[io.Model.Input("model")], outputs=[io.Model.Output()])

        @classmethod
        def execute(cls, model):
            again = {"force_deepcopy": True} if "force_deepcopy" in signature(model.clone).parameters else {}
            other = model.clone(**again)  # ComfyUI 0.12 cannot load again
            assert not again or other.model is not model.model
            return io.NodeOutput(other)

    class Extension(ComfyExtension):
        async def get_node_list(self):
            return [Foreign, Cancelled, Reloaded]

    async def comfy_entrypoint():
        return Extension()
"""


@pytest.fixture(scope="session")
def comfyui():
    """(folder, interpreter)"""
    folder = find_comfyui()
    if folder is None:
        pytest.skip(HINT)
    return folder, find_python(folder)


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    pytest.importorskip("websocket", reason="pip install websocket-client")
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("models/diffusion_models", "custom_nodes"):
        (base / folder).mkdir(parents=True)
    for name, options in MODELS.items():
        tiny.write(base / "models/diffusion_models" / name, **options)
    (base / "custom_nodes/helpers.py").write_text(textwrap.dedent(HELPERS))
    server = Server.fresh(comfyui[0], base)
    yield server
    server.stop()
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def client(server):
    return Client(server)


@pytest.fixture(scope="session")
def folder(server):
    """Where the MODELS are."""
    return server.base / "models/diffusion_models"


@pytest.fixture(scope="session")
def quantized(client, folder):
    """The tiny student through OneStepQuantize -> (path, what the node said, the run)."""
    run = client.run(quantize("student.safetensors", name=FOUR_BITS.removesuffix(".safetensors")))
    assert not run.errors, run.errors
    return folder / FOUR_BITS, run.outputs["quantize"]["text"][0], run
