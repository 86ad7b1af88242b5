# %% [markdown]
# # 12. Into ComfyUI
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/12_into_comfyui.ipynb)
#
# **You will learn** what a file must say so that another program draws the same picture; how four small mistakes spoil
# a good student; and, where a ComfyUI is installed, to run one from here and compare the numbers.
#
# **You need** [chapter 0](00_one_step_and_why.ipynb). **Time:** 1 minute to run, 15 to read. With ComfyUI beside it, 2.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # on Colab this installs OneStep; elsewhere the cell does nothing
    url = "onestep[notebooks] @ git+https://github.com/onestep-diffusion/onestep"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", url], check=True)

# %%
import os
import tempfile
from pathlib import Path

import torch

import distill
from distill import widgets

student, SEED = distill.load(distill.bundled("student")), 7
PROMPT = "a large red heart on a yellow background, center"
noise = torch.randn(student.shape(1), generator=torch.Generator().manual_seed(SEED))  # as ComfyUI draws it
latent = student.latents(noise, student.encode([PROMPT]))
here = student.decode(latent)
widgets.show(here[0], "a red heart on yellow: what the library draws")

# %% [markdown]
# That is seed 7 in the library. The goal of this chapter: the *same numbers* out of a ComfyUI graph.
#
# ## One file is the whole model
#
# A OneStep file holds network, text encoder and decoder, in the layout that ComfyUI uses for Stable Diffusion. And its
# metadata says how the network must be called. Loaders read it and contain no constants of their own:

# %%
from distill.file.metadata import read_metadata

room = Path(tempfile.mkdtemp())
path = student.save(room / "heart.safetensors", student.net)
meta = read_metadata(path)
for name in ("prediction", "t_in", "steps", "guidance"):
    print(f"{name:12s}", getattr(meta, name))
print(f"{'noise':12s}", {k: meta.schedule[k] for k in ("kind", "shift") if k in meta.schedule})
again = distill.load(path)
apart = (again.latents(noise, again.encode([PROMPT])) - latent).abs().max().item()
print(f"saved and loaded again, the latent differs by {apart:.1e}")
assert apart < 1e-3

# %% [markdown]
# ## Four ways to call it wrong
#
# - **The time.** A student was trained to begin at one time, `t_in`.
# - **The noise.** It expects noise of a certain strength.
# - **The prediction.** What the net says must be read as what it was trained to say.
# - **Guidance.** It is in the student's weights; guiding again blends pictures.
#
# Each looks like a bad model. Guess which hurts this student most:

# %%
question = widgets.predict(
    "Which mistake is farthest from the right picture?", ["time", "noise", "prediction", "guidance"]
)

# %%
from dataclasses import replace

from distill.denoiser import guided
from distill.sample import one_step


def called(t=None, strength=1.0, prediction=None, guidance=1.0):
    model = distill.load(path)
    model.meta = replace(model.meta, prediction=prediction or model.meta.prediction)
    draw = one_step(guided(model.denoiser, guidance, model.null), t or model.time())
    with torch.no_grad():
        return model.decode(draw(strength * noise, model.encode([PROMPT])))


other = "eps" if meta.prediction != "eps" else "x0"
wrong = {"time": called(t=0.4), "noise": called(strength=0.6), "prediction": called(prediction=other)}
wrong["guidance"] = called(guidance=3.0)
widgets.show(widgets.sheet({"right": here} | wrong, zoom=1.5), "a heart, and four spoiled ones")
distance = {name: (image - here).square().mean().sqrt().item() for name, image in wrong.items()}
print({name: round(d, 3) for name, d in distance.items()})
question.check(max(distance, key=distance.get))
assert min(distance.values()) > 0.002, "each moves the picture"

# %% [markdown]
# How sensitive is it? Slide the strength of the noise away from 1.

# %%
_ = widgets.explore(lambda strength: called(strength=strength)[0], strength=[1.0, 0.9, 0.75, 0.5, 0.25])

# %% [markdown]
# ## The graph
#
# In ComfyUI a picture is made by a graph of nodes. The file carries one that opens it; this is its core in the format of
# ComfyUI's API, node by node: load, words to numbers, an empty latent, one step, save. `OneStepSample` asks the file for
# time and noise.


# %%
def graph(file):
    sample = {"model": ["load", 0], "positive": ["words", 0], "latent": ["empty", 0], "seed": SEED}
    return {
        "load": {"class_type": "OneStepLoadStudent", "inputs": {"file": file}},
        "words": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": PROMPT}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sample": {"class_type": "OneStepSample", "inputs": sample},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "heart"}},
    }


for name, node in graph(path.name).items():
    links = {k: v for k, v in node["inputs"].items()}
    print(f"{name:7s} {node['class_type']:20s} {links}")

# %% [markdown]
# ## Run it
#
# The next cells look for a ComfyUI: at `COMFYUI_PATH`, else where `comfy install` puts one (`~/comfy/ComfyUI`). If there
# is one, they start it in an empty folder with this pack linked in, queue the graph and read the latent back. If not,
# they say so, and you have lost nothing but the comparison.

# %%
import socket

pack = Path(distill.__file__).parents[1]  # this repository: its folder is the node pack
comfyui = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
interpreter = next(
    (p for p in (comfyui / ".venv/bin/python", comfyui / "venv/bin/python") if p.exists()), sys.executable
)
server, address = None, None
if (comfyui / "main.py").is_file() and (pack / "nodes").is_dir():
    for folder in ("models/diffusion_models", "custom_nodes", "input", "output", "user/default"):
        (room / folder).mkdir(parents=True)
    path = path.rename(room / "models/diffusion_models" / path.name)
    (room / "custom_nodes/onestep").symlink_to(pack, target_is_directory=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    options = ["--cpu", "--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(room)]
    options += ["--port", address.split(":")[1], "--database-url", f"sqlite:///{room / 'comfyui.db'}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": comfyui}
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    server = subprocess.Popen([interpreter, "main.py", *options], env=clean, **quiet)
print("starting ComfyUI" if server else "no ComfyUI here: what follows is skipped")

# %%
import json
import time
import urllib.request


def ask(where, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{where}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def wait_for(found, seconds=200):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            if (value := found()) is not None:
                return value
        except OSError:  # it is not listening yet
            pass
        time.sleep(0.3)
    raise RuntimeError("ComfyUI did not answer in time; start it by hand to see what it says")


# %%
if server:
    wait_for(lambda: ask("/system_stats"))
    number = ask("/prompt", {"prompt": graph(path.name)})["prompt_id"]
    entry = wait_for(lambda: ask(f"/history/{number}").get(number))
    server.terminate()
    file = entry["outputs"]["save"]["latents"][0]
    from safetensors.torch import load_file

    there = load_file(room / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
    expected = latent / meta.latent["scale"] + meta.latent["shift"]
    apart = ((there - expected).abs().max() / expected.abs().max()).item()
    print(f"largest difference of the two latents, over the largest number in them: {apart:.1e}")
    assert apart < 2e-3, "ComfyUI should draw what the library draws"
    both = student.decode((there - meta.latent["shift"]) * meta.latent["scale"])
    widgets.compare(here[0], both[0], ("library", "ComfyUI"), zoom=3)

# %% [markdown]
# Where it ran: the seam is invisible. The same seed, words and file give the same latent in both programs, up to the
# sixteen bits in which the file keeps its numbers.
#
# By hand it is simpler: put this folder into `custom_nodes/`, start ComfyUI, and open *Workflow, Browse Templates,
# OneStep*. The help of each node is a page there. A student of your own, from chapter 9 or `distill train`, goes into
# `models/diffusion_models`; drag the file onto the canvas, and its graph opens.

# %% [markdown]
# ## Exercises
#
# **1.** Change `t_in` in a saved file's metadata (`student.save(path, student.net, t_in=399)`) and load it. What happens?
#
# <details><summary>Solution</summary>
#
# It loads, and both programs draw the same *wrong* picture: they believe the file. Metadata is part of the model.
# </details>
#
# **2.** Why does the library draw its noise on the CPU, even for a GPU?
#
# <details><summary>Solution</summary>
#
# A GPU's random numbers differ from kind to kind. ComfyUI draws on the CPU for the same reason, which is why one seed
# means one picture in both.
# </details>

# %% [markdown]
# ## References
#
# - ComfyUI's documentation: [docs.comfy.org](https://docs.comfy.org).
# - Lin and others, *Common diffusion noise schedules and sample steps are flawed* (2023): [arXiv 2305.08891](https://arxiv.org/abs/2305.08891).
# - The safetensors format: [github.com/huggingface/safetensors](https://github.com/huggingface/safetensors).
#
# **Next:** this is the last chapter. [docs/comfyui.md](../docs/comfyui.md) is the page for users,
# [docs/researcher.md](../docs/researcher.md) the one for those who train.
