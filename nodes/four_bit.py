"""Loading quantized models of any maker and architecture, as MODEL and CLIP that stay quantized."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..distill.header import CheckpointError
from .files import DIFFUSION, TEXT, choices, fingerprint, locate

CATEGORY = "OneStep"
KINDS = (".safetensors", ".sft", ".gguf")
NONE = "none"


def activations_input() -> io.Combo.Input:
    return io.Combo.Input(
        "activations",
        options=["auto", "float", "int8"],
        default="auto",
        advanced=True,
        optional=True,
        tooltip="How layers compute. auto: what suits the layer and the processor, with activations rounded to 8 "
        "bits where that is faster and nearly as exact. float: never round activations. int8: wherever possible.",
    )


def check(file: str | None, folders: tuple[str, ...]) -> bool | str:
    """Look at the header before anything runs: this message is shown on the node, an exception's is not."""
    if file is None:  # comes from another node
        return True
    from ..distill.packed import formats

    try:
        formats.check(locate(file, folders))
    except CheckpointError as e:
        return str(e)
    return True


class OneStepLoad4Bit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepLoad4Bit",
            display_name="OneStep Load 4-bit",
            category=CATEGORY,
            description="Loads a quantized diffusion model and keeps it quantized in memory: what OneStep Quantize "
            "made, GGUF, bitsandbytes NF4, nunchaku int4, and ComfyUI's own formats. Any model ComfyUI knows, "
            "convolutions too. LoRA works and stays exact.",
            search_aliases=[
                "4 bit",
                "int4",
                "quantized",
                "low vram",
                "GGUF",
                "UnetLoaderGGUF",
                "NF4",
                "bitsandbytes",
                "nunchaku",
                "svdquant",
                "awq",
                "load diffusion model",
                "UNETLoader",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=choices(DIFFUSION, KINDS),
                    tooltip="A quantized model in models/diffusion_models or models/checkpoints: safetensors, gguf. A "
                    "file that is not quantized loads too, as it is.",
                ),
                activations_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For any sampler. LoRA loaders and other patches may follow; weights stay quantized.",
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The text encoder inside the file: whole checkpoints and OneStep files have one.",
                ),
                io.Vae.Output(
                    display_name="vae",
                    tooltip="The VAE inside the file: whole checkpoints and OneStep files have one.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check(file, DIFFUSION)

    @classmethod
    def fingerprint_inputs(cls, file=None, activations="auto"):
        return fingerprint(file), activations

    @classmethod
    def execute(cls, file, activations="auto") -> io.NodeOutput:
        return io.NodeOutput(*load_file(locate(file), folder_paths.get_folder_paths("embeddings"), activations))


class OneStepLoad4BitCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = choices(TEXT, KINDS)
        return io.Schema(
            node_id="OneStepLoad4BitCLIP",
            display_name="OneStep Load 4-bit CLIP",
            category=CATEGORY,
            description="Loads quantized text encoders (CLIP, T5 and the others ComfyUI knows) and keeps them "
            "quantized in memory.",
            search_aliases=[
                "4 bit text encoder",
                "quantized clip",
                "T5",
                "CLIPLoader",
                "DualCLIPLoader",
                "CLIPLoaderGGUF",
                "int4",
                "GGUF",
                "low vram",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files,
                    tooltip="A quantized text encoder in models/text_encoders: .safetensors, .gguf. A dense one loads "
                    "too, as it is.",
                ),
                io.Combo.Input(
                    "type",
                    options=[t.name.lower() for t in comfy.sd.CLIPType],
                    default="stable_diffusion",
                    tooltip="The family of models it is for: what ComfyUI's Load CLIP asks for.",
                ),
                io.Combo.Input(
                    "second",
                    options=[NONE, *files],
                    default=NONE,
                    tooltip="A second text encoder, where the model takes two: SDXL and Flux do.",
                ),
                io.Combo.Input(
                    "third",
                    options=[NONE, *files],
                    default=NONE,
                    advanced=True,
                    optional=True,
                    tooltip="A third text encoder: Stable Diffusion 3 takes one.",
                ),
                activations_input(),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="For CLIP Text Encode. LoRA loaders may follow.")],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check(file, TEXT)  # of one input: ComfyUI says what is returned here once for each that is named

    @classmethod
    def fingerprint_inputs(cls, file=None, type=None, second=NONE, third=NONE, activations="auto"):
        return [fingerprint(f, TEXT) for f in (file, second, third) if f != NONE], type, activations

    @classmethod
    def execute(cls, file, type, second=NONE, third=NONE, activations="auto") -> io.NodeOutput:
        paths = [locate(f, TEXT) for f in (file, second, third) if f != NONE]
        return io.NodeOutput(load_clip(paths, type, folder_paths.get_folder_paths("embeddings"), activations))


def stock_formats():
    """The comfy_quant formats that this ComfyUI's own operations read."""
    from comfy.quant_ops import QUANT_ALGOS

    return QUANT_ALGOS.keys()


def load_file(path: Path, embeddings: list[str], activations: str = "auto", disable_dynamic: bool = True) -> tuple:
    """A file -> (MODEL, CLIP or None, VAE): a OneStep file by what it says of itself, others as ComfyUI sees them."""
    from ..distill.packed import formats
    from . import native
    from .native import detect

    loaded = formats.read(path, stock_formats())
    if "onestep.version" in loaded.metadata:
        model, clip, vae = native.load(path, embeddings, disable_dynamic, activations, loaded)
    else:
        model, clip, vae = detect.load(path, loaded.weights, loaded.metadata, embeddings, activations)
    for i, patcher in enumerate((model, clip and clip.patcher)):
        if patcher is not None:  # ComfyUI loads the weights again for other GPUs
            patcher.cached_patcher_init = (load_patchers, (path, embeddings, activations), i)
    return model, clip, vae


def load_patchers(*args, disable_dynamic: bool = True) -> tuple:
    model, clip, _ = load_file(*args, disable_dynamic=disable_dynamic)
    return model, clip and clip.patcher


def load_clip(paths: list[Path], kind: str, embeddings: list[str], activations: str = "auto"):
    """Files -> CLIP."""
    from ..distill.packed import formats
    from .native.detect import build_text

    clip = build_text(paths, [formats.read(p, stock_formats()).weights for p in paths], kind, embeddings, activations)
    clip.patcher.cached_patcher_init = (load_text_patcher, (paths, kind, embeddings, activations))
    return clip


def load_text_patcher(*args, disable_dynamic: bool = True):
    return load_clip(*args).patcher
