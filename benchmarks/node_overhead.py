"""How much of a one-step image's time goes to the nodes rather than to the network and the VAE.

    COMFYUI_PATH=~/comfy/ComfyUI ~/comfy/ComfyUI/.venv/bin/python benchmarks/node_overhead.py [file] [--batch 1]

Runs OneStepSample and VAEDecode inside ComfyUI, on CPU, with everything loaded, and prints medians as JSON. The
network's share is the time inside ComfyUI's UNetModel.forward, the VAE's the time inside the autoencoder's decode;
what is left of OneStepSample is "sampling", of which "ours" is spent in this pack's own lines and the rest in ComfyUI's
sampling machinery. Stock KSampler with one step and CFG 1 is timed beside it ("stock").
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("file", nargs="?", help="a OneStep file; default: the bundled student")
parser.add_argument("--batch", type=int, default=1, help="images at a time")
parser.add_argument("--runs", type=int, default=30)
parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
options = parser.parse_args()
pack = Path(__file__).resolve().parents[1]
comfyui = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy/ComfyUI"))
file = Path(options.file).resolve() if options.file else pack / "distill/tutorial/assets/student.safetensors"

sys.path[0] = str(comfyui)
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.samplers  # noqa: E402
import torch  # noqa: E402

import nodes  # noqa: E402

if options.threads:
    torch.set_num_threads(options.threads)
spec = importlib.util.spec_from_file_location("pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
from pack.nodes import OneStepLoadStudent, OneStepSample, load, recipe  # noqa: E402

load.locate = lambda _: file
spent = {}


def timed(name, function):
    def call(*a, **k):
        start = time.perf_counter()
        try:
            return function(*a, **k)
        finally:
            spent[name] = spent.get(name, 0) + time.perf_counter() - start

    return call


@torch.inference_mode()  # as ComfyUI runs nodes
def main() -> dict:
    model, clip, vae = timed("load", OneStepLoadStudent.execute)("file").result
    net, autoencoder = model.model.diffusion_model, vae.first_stage_model
    net.forward, autoencoder.decode = timed("network", net.forward), timed("vae", autoencoder.decode)
    sample, decode = timed("sample node", OneStepSample.execute), timed("decode node", nodes.VAEDecode().decode)
    encode = timed("encode node", nodes.CLIPTextEncode().encode)
    guider = comfy.samplers.CFGGuider  # OneStepSample calls it, it calls our sampler, that calls it for the network
    guider.sample, guider.__call__ = timed("guider", guider.sample), timed("predict", guider.__call__)
    recipe.sample_few_step = timed("sampler", recipe.sample_few_step)
    stock = timed("KSampler", nodes.KSampler().sample)
    side = model.model.diffusion_model.image_size if hasattr(net, "image_size") else 8
    latent = {"samples": torch.zeros(options.batch, 4, side, side), "downscale_ratio_spacial": 8}
    rows = []
    for seed in range(options.runs + 3):
        (positive,) = encode(clip, f"a large yellow star on a blue background {seed}")
        decode(vae, sample(model, positive, latent, seed).result[0])
        network, spent["network"] = spent["network"], 0.0
        ours = spent["sample node"] - spent["guider"] + spent["sampler"] - spent["predict"]
        stock(model, seed, 1, 1.0, "euler", "simple", positive, positive, latent)
        rows.append(
            dict(
                spent,
                network=network,
                ours=ours,
                sampling=spent["sample node"] - network,
                decoding=spent["decode node"] - spent["vae"],
                stock=spent["KSampler"] - spent["network"],
            )
        )
        for key in spent.keys() - {"load"}:
            spent[key] = 0.0
    ms = {key: round(1000 * statistics.median(row[key] for row in rows[3:]), 2) for key in rows[0]}
    image = ms["network"] + ms["vae"]
    return {
        "file": file.name,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "ms": ms,
        "ours": round(ms["ours"] / image, 3),
        "ours and ComfyUI's": round(ms["sampling"] / image, 3),
        "stock KSampler": round(ms["stock"] / image, 3),
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
