"""Where a student starts: `--init` of `distill train`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import need
from ..header import CheckpointError

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..student import StudentOptions


def start_of(init: str | None, teacher: Backbone, form: StudentOptions) -> tuple[dict[str, Any], str]:
    """`net` or `adapters` for train_student, and the name of what a LoRA would add to.

    Raises CheckpointError for a model of another architecture, ValueError for a LoRA of another base or form.
    """
    from ..adapters import merged
    from ..backbones import load
    from ..file import lora
    from ..tutorial.bundled import find
    from .console import named

    if init is None:
        return {}, teacher.name
    path = find(init)
    if not lora.is_lora(path):
        net = load(path, teacher.device).net
        ours, theirs = ({k: v.shape for k, v in n.state_dict().items()} for n in (teacher.net, net))
        if ours != theirs:
            raise CheckpointError(f"{init}: another architecture than {teacher.name}'s. Start from one of its kind.")
        return {"net": net}, named(path, Path(path).name)
    held = lora.read(path)
    need(held.base == teacher.name, "init", init, f"a LoRA of {held.base}; give that as --teacher")
    if form.student == "full":
        return {"net": copy.deepcopy(merged(teacher.net, held.adapters))}, teacher.name
    rank, alpha = held.adapters.rank, held.adapters.alpha
    cure = f"its LoRA has rank {rank} and alpha {alpha:g}: --student-rank {rank} --student-alpha {alpha:g}"
    need((form.student_rank, form.scaled_by) == (rank, alpha), "init", init, cure)
    return {"adapters": held.adapters.unfolded()}, teacher.name
