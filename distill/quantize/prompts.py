"""What a model is calibrated on when its caller has no prompts of its world."""

from __future__ import annotations

from ..training.prompts import read_prompts
from .options import Quantize

GENERAL = (
    "a photograph of an old fisherman mending a net in the harbour, morning light",
    "a watercolour painting of a fox asleep under a birch tree",
    "a city street at night in the rain, neon signs reflected in puddles, cinematic",
    "a bowl of ramen with a soft egg, seen from above on a wooden table",
    "portrait of a young woman with freckles and a red scarf, shallow depth of field",
    "a lighthouse on a cliff in a storm, oil on canvas",
    "an isometric drawing of a small greenhouse full of cacti",
    "a steam locomotive crossing a stone viaduct in autumn, wide angle",
)
"""pictures of many kinds"""


def given_prompts(options: Quantize, count: int, last: bool = False) -> tuple[list[str], str]:
    """(`count` prompts, again and again those of the options' file, else GENERAL; what to call them). last: from the
    end. Raises ValueError for a file without any, OSError for one that cannot be read."""
    kind, given = "general prompts", list(GENERAL)
    if options.prompts is not None:
        kind, given = "prompts", read_prompts(options.prompts)
    given = given[::-1] if last else given
    return [given[i % len(given)] for i in range(count)], f"{count} {kind}"
