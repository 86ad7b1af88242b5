"""A LoRA file on the model that it was made of, as a model of its own."""

from __future__ import annotations

import copy
from pathlib import Path

from ..adapters import merged
from ..file.lora import LoraFile
from ..header import CheckpointError
from .base import Backbone


def adapted(base: Backbone, held: LoraFile, path: str | Path) -> Backbone:
    """The student of which `path` holds the LoRA, its weights added up in fp32; `base` stays as it is.

    Raises CheckpointError where the two do not fit.
    """
    cure = f"Give the model that it was made of, {held.base}."
    if held.part != base.main:
        raise CheckpointError(f"{path}: a LoRA of a {held.part}, and {base.name} has a {base.main}. {cure}")
    try:
        net = merged(base.net, held.adapters)
    except ValueError as error:
        raise CheckpointError(f"{path}: no LoRA of {base.name}: its layer {error}. {cure}") from None
    student = copy.copy(base)
    student.parts = {**base.parts, base.main: net}
    student.meta, student.name = held.student(base.meta, path), Path(path).name
    return student
