"""Checks that need ComfyUI's own objects in hand: ComfyUI's interpreter runs this file for test_4bit_inside.py.

`inside.py OUT FOLDER [PART]`: runs every function called check_* (with PART in its name) of the modules inside_*.py on
the tiny student in FOLDER and writes {name: "" or the traceback} to OUT.
"""

import json
import time
import traceback
from pathlib import Path

from inside_setup import ARGUMENTS  # first: the imports below need comfy

# isort: split
import comfy.model_management as mm
import inside_controlnet
import inside_lora
import inside_memory
import inside_models
import inside_negative
import inside_train

OUT = Path(ARGUMENTS[0])
MODULES = (inside_controlnet, inside_lora, inside_memory, inside_models, inside_negative, inside_train)
ONLY = ARGUMENTS[2] if len(ARGUMENTS) > 2 else ""


def main() -> None:
    results = {}
    for name, function in [item for m in MODULES for item in vars(m).items()]:
        if name.startswith("check_") and ONLY in name:
            start = time.time()
            try:
                function()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
            mm.unload_all_models()
            print(f"{name}: {time.time() - start:.1f} s {'' if not results[name] else results[name]}", flush=True)
    OUT.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
