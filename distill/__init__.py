"""OneStep: train, quantize and run one-step diffusion models.

    import distill

    teacher = distill.load(distill.bundled("teacher"))             # a OneStep file, a diffusers folder or org/model
    batches = distill.prompt_batches(teacher, ["a red ring", ...], batch_size=16)
    for step in distill.train_student(teacher, distill.VSDOptions(), batches, distill.TrainOptions(steps=500)):
        print(step.step, step.logs["coach_ratio"])
    teacher.save_student("student.safetensors", step.ema, method="vsd")

models      load, bundled, Backbone, Own (a teacher of yours), to_pil
denoisers   from_net, guided, autoguided, schedules in `distill.schedule`
samplers    one_step, few_step, solve
training    train_student, TrainOptions, prompt_batches, image_batches; train for nets and methods of your own
methods     VSD, SDS, Regression with VSDOptions, SDSOptions, RegressionOptions; Method, Net, Phase to write another
coaches     LoraCoach, CopyCoach, Student, StudentOptions
toys        Gaussian, Mixture, ring, and `distill.toy`'s Student and Coach: teachers that are known exactly
four bits   quantize_file, quantize_ for a module in memory, Quantize
judging     Judge, evaluate: of the tutorial world

Names are imported when they are first used, so that `import distill` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FACE = {
    "backbones": ["load"],
    "backbones.base": ["Backbone"],
    "backbones.drawing": ["to_pil"],
    "backbones.own": ["Own"],
    "tutorial.bundled": ["bundled"],
    "denoiser": ["from_net", "guided", "autoguided"],
    "sample": ["one_step", "few_step", "solve"],
    "training.students": ["train_student"],
    "training.loop": ["train", "Diverged"],
    "training.options": ["TrainOptions"],
    "training.batches": ["prompt_batches", "image_batches"],
    "methods.base": ["Method", "Net", "Phase"],
    "methods.vsd": ["VSD", "VSDOptions"],
    "methods.sds": ["SDS", "SDSOptions"],
    "methods.regression": ["Regression", "RegressionOptions"],
    "coach": ["LoraCoach", "CopyCoach"],
    "student": ["Student", "StudentOptions"],
    "toy": ["Gaussian", "Mixture", "ring"],
    "quantize.run": ["quantize_file"],
    "quantize.module": ["quantize_"],
    "quantize.options": ["Quantize"],
    "tutorial.metrics": ["Judge", "evaluate"],
    "header": ["CheckpointError"],
}
_HOME = {name: module for module, names in _FACE.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
