"""Damaged OneStep files in ComfyUI's own objects; ComfyUI's interpreter runs this for test_damaged_inside.py.

`damaged_inside.py OUT FOLDER COUNT`: COUNT damaged copies of FOLDER's student.safetensors and packed.safetensors
through OneStep Load Student and, where that succeeds, a prompt, a step and the VAE, in 500 MB beyond what a sound one
takes.
Writes to OUT how many were refused and how many gave a picture, or the traceback of what was neither.
"""

import json
import random
import sys
import traceback
from pathlib import Path

from inside_setup import ARGUMENTS, PACK, imported  # first: the imports below need comfy

# isort: split
import comfy.model_management as mm
import torch

sys.path.append(str(PACK / "tests"))
import mutants  # noqa: E402

OUT, FOLDER, COUNT = Path(ARGUMENTS[0]), Path(ARGUMENTS[1]), int(ARGUMENTS[2])
native, sample = imported("nodes.native"), imported("nodes.sample")
CheckpointError = imported("distill.header").CheckpointError


def use(path: Path) -> None:
    model, clip, vae = native.load(path, [], disable_dynamic=True)
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a small red ring"))
    latent = {"samples": torch.zeros(1, 8, 8, 8)}
    latent = sample.OneStepSample.execute(model, cond, latent, 0).args[0]
    assert vae is None or vae.decode(latent["samples"]).shape[-1] == 3
    mm.unload_all_models()


def main() -> None:
    torch.set_num_threads(1)
    dense, packed = FOLDER / "student.safetensors", FOLDER / "packed.safetensors"
    assert not any(mutants.refused(use, path, CheckpointError) for path in (dense, packed))
    ways, counts, choose = mutants.ways(dense, packed), [0, 0], random.Random(0).choice
    mutants.limit_memory()
    for i in range(COUNT):
        how, file = choose(ways)
        path = how(file, choose).write(FOLDER / "m.safetensors")
        try:
            counts[mutants.refused(use, path, CheckpointError)] += 1
        except Exception:
            OUT.write_text(json.dumps({"error": f"file {i}: {traceback.format_exc()}"}))
            return
    OUT.write_text(json.dumps({"refused": counts[1], "pictures": counts[0]}))


if __name__ == "__main__":
    main()
