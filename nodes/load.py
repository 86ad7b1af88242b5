"""Loading: a OneStep file becomes ComfyUI's own MODEL, CLIP and VAE."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..distill.file.metadata import read_metadata
from ..distill.header import CheckpointError
from .files import BUNDLED, DIFFUSION, choices, fingerprint, locate


class OneStepLoadStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepLoadStudent",
            display_name="OneStep Load Student",
            category="OneStep",
            description="Loads a OneStep file, a one-step student or its teacher, as ordinary MODEL, CLIP and VAE. "
            "Everything it needs to know is in the file; quantized ones stay in 4 bits.",
            search_aliases=[
                "load one step model",
                "load distilled",
                "checkpoint loader",
                "student",
                "teacher",
                "turbo",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=choices(DIFFUSION, bundled=True),
                    default=next(iter(BUNDLED)),
                    tooltip="A file made by `distill train`, `distill demo` or OneStep Quantize, in "
                    "models/diffusion_models or models/checkpoints, or one of the models that come with OneStep.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For OneStep Sample or OneStep Schedule; any other sampler takes it too.",
                ),
                io.Clip.Output(display_name="clip", tooltip="The text encoder, with the file's own vocabulary."),
                io.Vae.Output(display_name="vae", tooltip="Decodes latents into images."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        """Check the header before anything runs: this message is shown on the node, an exception's is not."""
        if file is None:  # comes from another node
            return True
        try:
            read_metadata(locate(file))
        except CheckpointError as e:
            return str(e)
        return True

    @classmethod
    def fingerprint_inputs(cls, file):
        """A file that was written again under the same name is loaded again."""
        return fingerprint(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        from . import native

        return io.NodeOutput(*native.load(locate(file), folder_paths.get_folder_paths("embeddings")))
