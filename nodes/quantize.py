"""Quantizing a model from inside ComfyUI."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..distill.file.metadata import read_metadata
from ..distill.header import CheckpointError, read_header
from .files import BUNDLED, DIFFUSION, TEXT, check_target, choices, fingerprint, locate, place

if TYPE_CHECKING:
    from ..distill.quantize.calibrate import LayerStats
    from ..distill.quantize.options import Quantize

FOLDERS = (*DIFFUSION, *TEXT)
METHODS = ("auto", "rtn", "clip", "awq", "svd", "smoothquant")
MADE: set[Path] = set()  # files this process made
LOST: Counter[Path] = Counter()  # how often one of them went away again


class OneStepQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepQuantize",
            display_name="OneStep Quantize",
            category="OneStep",
            description="Makes a 4-bit file of a diffusion model or a text encoder, convolutions included: about a "
            "quarter of the half-precision file's size. Models are run on prompts to round them better: OneStep files "
            "by themselves, others where their MODEL and CLIP are connected.",
            search_aliases=["quantize", "4 bit", "int4", "compress model", "smaller model", "awq", "svdquant", "GGUF"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=choices(FOLDERS, (".safetensors", ".sft"), bundled=True),
                    default=next(iter(BUNDLED)),
                    tooltip="A dense model in models/diffusion_models, models/checkpoints or models/text_encoders, or "
                    "one of the models that come with OneStep.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Name of the new file in models/diffusion_models (models/text_encoders for text encoders). "
                    "Empty: the old name with -4bit behind it.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="auto",
                    tooltip="How numbers are rounded. auto: awq where the model can be run, else clip. rtn: to "
                    "nearest. clip: with the best range of each group. awq: by what activations need. svd: with a "
                    "low-rank branch in 16 bits. smoothquant: weights and activations in 8 bits.",
                ),
                io.Combo.Input(
                    "bits",
                    options=["4", "3", "2", "8"],
                    default="4",
                    tooltip="Bits of a weight. Codes of 3 and 2 bits lose more and are stored in 4.",
                ),
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=16.0,
                    step=0.1,
                    advanced=True,
                    optional=True,
                    tooltip="Mixed precision: bits a weight on average, everything counted. The most sensitive layers "
                    "get 8 or 16 bits. 0: all layers alike.",
                ),
                io.Boolean.Input(
                    "text_encoder",
                    default=False,
                    advanced=True,
                    optional=True,
                    tooltip="Quantize the text encoder inside a checkpoint, too.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    advanced=True,
                    optional=True,
                    tooltip="Prompts to calibrate on, one a line. Empty: the tutorial's shapes for its models, general "
                    "prompts for others.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For files that are not OneStep's: the model in the file, from its usual loader, to be run "
                    "on prompts. Without it such a file is quantized by its weights alone.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder that goes with the model."),
                io.Latent.Input(
                    "latent", optional=True, tooltip="An empty latent of the size you draw at. Default: 64 x 64."
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=100,
                    advanced=True,
                    optional=True,
                    tooltip="Sampling steps of a calibration picture of a connected model.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    advanced=True,
                    optional=True,
                    tooltip="Its guidance: what you draw with. 1 for distilled models.",
                ),
            ],
            outputs=[
                io.Combo.Output(
                    "file",
                    display_name="file",
                    tooltip="The new file's name, for the file input of a OneStep loader.",
                ),
                io.String.Output("report", display_name="report", tooltip="Size, bits per weight and errors."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        """Of one input: ComfyUI says what is returned here once for each that is named."""
        try:
            if file is not None:
                read_header(locate(file, FOLDERS))
        except CheckpointError as e:
            return str(e)
        return True

    @classmethod
    def fingerprint_inputs(cls, file=None, name="", **options):
        """Quantized again when the old file changed, or the new one was deleted."""
        out = None if file is None or name is None else target(file, name)
        if out in MADE and not out.is_file():
            MADE.remove(out)
            LOST[out] += 1
        return fingerprint(file, FOLDERS), name, sorted(options.items()), LOST[out]

    @classmethod
    def execute(
        cls, file, name, method, bits, budget=0.0, text_encoder=False, prompts="",
        model=None, clip=None, latent=None, steps=8, cfg=5.0,
    ) -> io.NodeOutput:  # fmt: skip
        started = time.monotonic()
        from ..distill.quantize.options import Quantize
        from ..distill.quantize.run import quantize_file

        source, out = locate(file, FOLDERS), target(file, name)
        options = Quantize(
            method=method,
            bits=int(bits),
            budget=budget or None,
            text_encoder=text_encoder,
            calibrate=False,  # what is run is run here, in ComfyUI
        )
        stats, said = statistics(source, options, prompts, (model, clip, latent, steps, cfg))
        report = quantize_file(source, out, options, stats, progress(), force=True)  # `target` has its own rule
        MADE.add(out)
        new = out.relative_to(place(folder_of(source))).as_posix()
        report.calibration, report.out, report.seconds = said, new, time.monotonic() - started
        text = report.table()
        return io.NodeOutput(new, text, ui=ui.PreviewText(text))


def statistics(source: Path, options: Quantize, prompts: str, graph: tuple) -> tuple[dict[str, LayerStats] | None, str]:
    """(what flows into the layers or None, what to say about it). graph: model, clip, latent, steps and cfg."""
    if options.method == "rtn" and options.budget is None:
        return None, "rounding to nearest takes no calibration"
    from .native import calibrate

    given = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not is_onestep(source):
        connected = calibrate.Connected(*graph)
        if connected.model is None and connected.clip is None:
            return None, "data-free: connect the file's MODEL and CLIP to have it run on prompts"
        stats = connected.calibrate(source, given, options.text_encoder, progress())
        return stats, connected.said(len(given))
    meta = read_metadata(source)
    if meta.architecture.get("text_encoder") is None:
        return None, "data-free: the file has no text encoder to read prompts with"
    given, what = (given, f"{len(given)} prompts") if given else calibrate.default_prompts(meta)
    stats = calibrate.calibrate(source, meta, given, options.text_encoder, progress())
    return stats, calibrate.said(meta, what)


def is_onestep(source: Path) -> bool:
    """Whether a file says how it is run."""
    return "onestep.version" in read_header(source).get("__metadata__", {})


def progress() -> Callable[[int, int, str], None]:
    """ComfyUI's bar, which starts again for each kind of work, and its Cancel button."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int, what: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, max(total, 1))

    return report


def folder_of(source: Path) -> str:
    """Where the quantized file belongs: beside other text encoders, or among the diffusion models."""
    text = any(source.is_relative_to(p) for p in folder_paths.get_folder_paths("text_encoders"))
    return "text_encoders" if text else "diffusion_models"


def target(file: str, name: str) -> Path:
    """Where the new file goes. Raises CheckpointError where it must not go there."""
    source = locate(file, FOLDERS)
    root = Path(place(folder_of(source)))
    name = name.strip() or f"{Path(file.removeprefix('bundled: ')).with_suffix('')}-4bit"
    out = root / (name.removesuffix(".safetensors") + ".safetensors")
    check_target(out)
    if not out.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"name {name!r} leads out of {root}. Give a name without '..'.")
    if out.is_file():
        if out.resolve() == source.resolve():
            raise CheckpointError(f"{out}: that is the file to be quantized. Give another name.")
        if "quantization" not in read_header(out).get("__metadata__", {}):
            raise CheckpointError(f"{out}: there is a file of that name, and it is not a quantized one. Give another.")
    return out
