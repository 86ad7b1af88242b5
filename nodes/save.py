"""Saving: a MODEL that was changed in the graph becomes a OneStep file again."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..distill.header import CheckpointError
from .files import check_target


class OneStepSaveStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepSaveStudent",
            display_name="OneStep Save Student",
            category="OneStep",
            description="Saves a OneStep model with all its patches baked in, LoRA and merges included, as one file "
            "that every OneStep loader opens. 4-bit layers stay 4-bit, and the file carries this workflow.",
            search_aliases=["save student", "save checkpoint", "CheckpointSave", "bake lora", "merge lora", "export"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model from OneStep Load Student or, of a OneStep file, OneStep Load 4-bit; through any "
                    "LoRA or merge.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="checkpoints/student",
                    tooltip="Where in the output folder, and how the name begins; a number follows. Loaders find what "
                    "is in output/checkpoints or output/diffusion_models: press R.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The CLIP of the same loader. Not connected: left out of the file."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The VAE of the same loader. Not connected: left out of the file."
                ),
            ],
            hidden=[io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        try:
            if filename_prefix is not None:
                check_target(Path(folder_paths.get_output_directory()) / f"{filename_prefix}_00001_.safetensors")
        except CheckpointError as e:
            return str(e)
        return True

    @classmethod
    def execute(cls, model, filename_prefix, clip=None, vae=None) -> io.NodeOutput:
        from ..distill.file.checkpoint import write
        from .native.save import collect

        workflow = None if args.disable_metadata else (cls.hidden.extra_pnginfo or {}).get("workflow")
        checkpoint = collect(model, clip, vae, workflow)
        output = folder_paths.get_output_directory()
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, output)
        path = write(Path(folder) / f"{name}_{counter:05}_.safetensors", checkpoint)
        said = f"{Path(subfolder) / path.name}: {path.stat().st_size / 2**20:.1f} MiB"
        return io.NodeOutput(ui=ui.PreviewText(said))
