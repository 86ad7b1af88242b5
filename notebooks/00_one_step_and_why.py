# %% [markdown]
# # 0. One step, and why
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/00_one_step_and_why.ipynb)
#
# **You will learn** what a one-step diffusion model is, what it gains, and what it had to learn that its teacher did
# not know. This is the course's front door: run everything, move the sliders, then choose where to go.
#
# **You need** Python; nothing else. **Time:** 1 minute to run, 10 to read.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # on Colab this installs OneStep; elsewhere the cell does nothing
    url = "onestep[notebooks] @ git+https://github.com/onestep-diffusion/onestep"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", url], check=True)

# %%
import time

import torch

import distill
from distill import widgets

teacher, student = distill.load(distill.bundled("teacher")), distill.load(distill.bundled("student"))
PROMPTS = ["a large yellow star on a pink background, center", "a small red ring on a blue background, top left"]
PROMPTS += ["a large green heart on a white background", "a small white square on a brown background, bottom right"]
TRIED = widgets.size([1, 2, 4, 8, 20], [1, 2, 8])
widgets.show(widgets.sheet({"student, 1 step": student.sample(PROMPTS, torch.Generator().manual_seed(0))}))

# %% [markdown]
# Four prompts, four pictures, one call of a network each. Now the same beside its teacher. Move the sliders.


# %%
def drawn(seed):
    rows = {}
    for steps in TRIED:
        start = time.perf_counter()
        rows[steps] = teacher.sample(PROMPTS, torch.Generator().manual_seed(seed), steps=steps)
        seconds["teacher", steps] = time.perf_counter() - start
    start = time.perf_counter()
    one = student.sample(PROMPTS, torch.Generator().manual_seed(seed))
    seconds["student", 1] = time.perf_counter() - start
    return rows, one


seconds, cache = {}, {seed: None for seed in range(widgets.size(3, 1))}


def look(steps, seed):
    cache[seed] = cache[seed] or drawn(seed)
    rows, one = cache[seed]
    return widgets.sheet({f"teacher, {steps} steps": rows[steps], "student, 1 step": one})


_ = widgets.explore(look, steps=TRIED, seed=list(cache))

# %% [markdown]
# Above, the *teacher*: a diffusion model that was trained on small drawings of shapes and their descriptions. Below, the
# *student*, always with one step. Both start from the same noise and the same words. Move the slider: at how many steps
# is the teacher as good as the student is at one?
#
# A diffusion model begins with noise and cleans it, step by step. Every step is a call of a large network, so time is
# proportional to steps:

# %%
for (who, steps), s in seconds.items():
    print(f"{who}, {steps:2d} steps: {1000 * s / len(PROMPTS):6.0f} ms a picture")
most = TRIED[-1]
speedup = seconds["teacher", most] / seconds["student", 1]
print(f"the student is {speedup:.0f} times as fast as the teacher in {most} steps")
assert speedup > 2

# %% [markdown]
# ## What the teacher knows
#
# The teacher's net has learned to answer one question: *which clean picture is behind this noisy one?* From pure noise
# almost any picture is possible, so in the first step its best answer is the **mean of all pictures** that fit the words:
# a blur. Only later steps, with less and less noise, decide where the edge is.
#
# The student's net is of the same kind and size. It was trained to give, in that very first step, *one* picture instead
# of the mean. How, without ever seeing a real picture, is the story of chapters 4 to 6.

# %%
question = widgets.predict(
    "Which picture has more contrast between neighbours, on average?", ["teacher, 1 step", "student, 1 step"]
)


# %%
def edges(images):  # mean difference of neighbouring pixels, a measure of sharpness
    return (images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()).item()


rows, one = cache[0]
sharp = {f"teacher, {n} steps": edges(rows[n]) for n in (1, most)} | {"student, 1 step": edges(one)}
for name, value in sharp.items():
    print(f"{name:18s} {value:.4f}")
question.check("student, 1 step" if sharp["student, 1 step"] > sharp["teacher, 1 steps"] else "teacher, 1 step")
assert sharp["student, 1 step"] > sharp["teacher, 1 steps"]

# %% [markdown]
# Slide the seam: the same noise, the same words, one call of a network on either side.

# %%
_ = widgets.compare(rows[1][0], one[0], ("teacher, one step", "student, one step"), zoom=4)

# %% [markdown]
# ## Sharp is not enough
#
# A model that always draws the *same* sharp star would pass the test above. So also ask: are pictures for one prompt
# different from noise to noise? Here are eight of each, and the mean distance between two of a row.

# %%
same = ["a large red circle"] * 8  # background and place are left open
eight = {
    f"teacher, {most} steps": teacher.sample(same, torch.Generator().manual_seed(5), steps=most),
    "teacher, 1 step": teacher.sample(same, torch.Generator().manual_seed(5), steps=1),
    "student, 1 step": student.sample(same, torch.Generator().manual_seed(5)),
}
widgets.show(widgets.sheet(eight), "eight pictures in each of three rows")
apart = {name: torch.pdist(images.flatten(1)).mean().item() for name, images in eight.items()}
print({name: round(value, 1) for name, value in apart.items()})
assert apart["student, 1 step"] > apart["teacher, 1 step"]

# %% [markdown]
# The blurred ones differ least: means resemble each other. The student's differ like pictures do. To keep that variety
# while getting sharp is the hard part of distillation, and it is what the *coach* is for.
#
# ## Where the time goes
#
# Words become numbers (text encoder), noise becomes a *latent*, a small compressed picture (the network), and the latent
# is unfolded to pixels (decoder). For a teacher only the middle counts. For one step, look:

# %%
parts, n = {}, widgets.size(20, 5)
cond, z = student.encode(PROMPTS[:1]), torch.randn(student.shape(1), generator=torch.Generator().manual_seed(6))
latent = student.latents(z, cond)


def clock(work):
    work()  # the first call is always slower
    start = time.perf_counter()
    for _ in range(n):
        work()
    return (time.perf_counter() - start) / n * 1000


with torch.no_grad():
    parts["words"] = clock(lambda: student.encode(PROMPTS[:1]))
    parts["network"] = clock(lambda: student.latents(z, cond))
    parts["decoder"] = clock(lambda: student.decode(latent))
figure, ax = widgets.axes(width=5, height=1.8)
ax.barh(list(parts), list(parts.values()), color=widgets.COLOURS["student"])
ax.set(xlabel="milliseconds for one picture in one step")
widgets.show(figure, "three bars")
assert sum(parts.values()) > parts["network"]

# %% [markdown]
# ## The map
#
# | | | |
# |---|---|---|
# | [1](01_a_teacher_you_can_trust.ipynb) | A teacher you can trust | noise, denoisers, schedules |
# | [2](02_better_solvers.ipynb) | Fewer steps by better solvers | how far without training |
# | [4](04_without_a_coach.ipynb) | Without a coach | a collapse, watched live |
# | [5](05_the_coach.ipynb) | The coach | the idea this course is about |
# | [6](06_keeping_it_stable.ipynb) | Keeping it stable | a gallery of failures |
# | [9](09_your_own_student.ipynb) | Your own student | a Stable Diffusion, with LoRA |
# | [10](10_four_bits.ipynb) | Four bits | rounding, by hand and by library |
# | [11](11_how_fast_is_it.ipynb) | How fast is it really | measuring, memory, kernels |
# | [12](12_into_comfyui.ipynb) | Into ComfyUI | the same picture in a node graph |
#
# Numbers 3, 7 and 8 are kept for progressive distillation, adversarial terms and consistency.

# %% [markdown]
# ## Exercises
#
# **1.** Write a prompt of your own with `student.sample([...], torch.Generator().manual_seed(0))` and
# `widgets.show(pictures[0])`. Which words does it know?
#
# <details><summary>Solution</summary>
#
# Sizes, colours, shapes, backgrounds and places: `distill.tutorial.shapes.ATTRIBUTES` lists them. Words that it does
# not know are passed over.
# </details>
#
# **2.** Is the student limited to one step? Try `steps=2` in `student.sample`.
#
# <details><summary>Solution</summary>
#
# It runs: it predicts, adds fresh noise at half the time, predicts again. Whether a student practised that second call
# says `student.meta.config`: then `student_steps` is in it. One that did not may gain nothing; judge for yourself.
# </details>

# %% [markdown]
# ## References
#
# - Luhman and Luhman, *Knowledge distillation in iterative generative models* (2021): [arXiv 2101.02388](https://arxiv.org/abs/2101.02388).
# - Nguyen and Tran, *SwiftBrush* (2023): [arXiv 2312.05239](https://arxiv.org/abs/2312.05239).
# - Yin and others, *Distribution Matching Distillation* (2023): [arXiv 2311.18828](https://arxiv.org/abs/2311.18828).
#
# **Next:** [chapter 1](01_a_teacher_you_can_trust.ipynb), from the beginning; or
# [chapter 5](05_the_coach.ipynb), if you know diffusion models.
