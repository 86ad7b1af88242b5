"""The subgraph blueprints, each described once; tests/comfyui/refresh.py draws them into subgraphs/, where ComfyUI
looks for those of a pack. A file's name is what the node library shows."""

from __future__ import annotations

from draw import Asked
from pieces import WORLD, box, decode, sample, text
from subgraph import Blueprint

SIZE = box("EmptyLatentImage", width=Asked(64), height=Asked(64), batch_size=Asked(4, "pictures"))
BLUEPRINTS: dict[str, Blueprint] = {}

BLUEPRINTS["One-step text to image"] = Blueprint(
    "Draws pictures of a prompt with a OneStep student, in the one step or the few that its file says.",
    [
        {"load": box("OneStepLoadStudent", file=Asked("bundled: student", "student"))},
        {"positive": text(("load", 1), Asked(WORLD, "prompt")), "empty": SIZE},
        {"sample": sample("load", "positive", seed=Asked(1))},
        {"decode": decode("sample", ("load", 2)), "preview": box("PreviewImage", images=("decode", 0))},
    ],
    [270, 300, 260, 240],
    {"image": ("decode", 0)},
    (320, 480),
)
BLUEPRINTS["Quantize and load 4-bit"] = Blueprint(
    "Rounds a model to four bits a weight and loads it, packed in memory: MODEL, and of whole checkpoints CLIP and "
    "VAE. Afterwards OneStep Load 4-bit alone opens the new file, which is in models/diffusion_models.",
    [
        {
            "quantize": box("OneStepQuantize", file=Asked("bundled: student", "model"), method=Asked("auto"),
                            bits=Asked("4")),
        },
        {"load": box("OneStepLoad4Bit", file=("quantize", 0))},
    ],
    [300, 280],
    {"model": ("load", 0), "clip": ("load", 1), "vae": ("load", 2), "report": ("quantize", 1)},
    (300, 170),
)  # fmt: skip
