# %% [markdown]
# # 2. Fewer steps by better solvers
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/02_better_solvers.ipynb)
#
# **You will learn** how far you get without training anything: three solvers, their quality and their time at 1 to 1000
# steps, in the plane and on pictures; and why the last steps cannot be saved that way.
#
# **You need** [chapter 1](01_a_teacher_you_can_trust.ipynb). **Time:** 2 minutes to run, 20 to read.

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
from distill import sample, schedule, toy, widgets

teacher = toy.Mixture(toy.ring(8, radius=2.0), 0.3, schedule.flow())
noise = torch.randn(1500, 2, generator=torch.Generator().manual_seed(0))
truth = teacher.sample(1500, torch.Generator().manual_seed(1))


def solved(steps, solver):
    figure, ax = widgets.axes(width=3.4, height=3.5)
    x = sample.solve(teacher, noise, solver=solver, steps=steps)
    widgets.points(widgets.plane(ax, f"{solver}, {steps} steps"), x, "teacher")
    return figure


_ = widgets.explore(solved, steps=[1, 2, 4, 8, 20, 50], solver=["ddim", "dpm++"])

# %% [markdown]
# One step: a single dot in the middle, for every noise, as chapter 1 explained. Two steps: a disc. Four: a ring that
# begins to swell in eight places. From eight on the blobs stand.
# Nothing was trained; the teacher is the same, only asked less often.
#
# ## A path and its shortcuts
#
# From noise to a clean point the teacher prescribes a smooth curve: at every place its answer says in which direction
# to go on. A *solver* follows the curve in straight pieces. Fewer pieces, larger detours.
#
# **DDIM**, here the same as **Euler's** method: take the answer $x_0$ as it is, keep the noise it implies, and mix the
# two again at the next, lower noise level. One line of code:

# %%
import inspect

print(inspect.getsource(sample.ddim_step))

# %% [markdown]
# **DPM-Solver++** remembers the answer before. If the answers moved from there to here, they will move on a little, so
# it uses a prediction of the *next* answer. It measures how far to go by $\log(\alpha/\sigma)$, the logarithm of signal
# over noise, in which answers move evenly. Same cost, one call a step:

# %%
print(inspect.getsource(sample.dpm_step))

# %% [markdown]
# ## Quality against steps
#
# We need a number for "the same points as the truth". The *energy distance* compares two sets: the mean distance between
# the sets, twice, minus the mean distances within each. It is 0 when both follow the same *law*, that is, when every
# place is as likely in one as in the other. Two sets of true points are not at exactly 0 either, because they are
# finite; their value is the floor.

# %%
question = widgets.predict("Which solver is nearer to the truth at 10 steps?", ["ddim", "dpm++", "equal"])


# %%
def distance(a, b):
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


floor = distance(teacher.sample(1500, torch.Generator().manual_seed(2)), truth)
STEPS = widgets.size([1, 2, 4, 10, 20, 50, 100, 1000], [1, 2, 4, 10, 20, 50, 100])
quality, seconds = {}, {}
for solver in ("ddim", "dpm++"):
    for steps in STEPS:
        start = time.perf_counter()
        x = sample.solve(teacher, noise, solver=solver, steps=steps)
        seconds[solver, steps] = time.perf_counter() - start
        quality[solver, steps] = max(distance(x, truth), 1e-5)
print(f"floor {floor:.4f}")
for solver in ("ddim", "dpm++"):
    print(solver, {n: round(quality[solver, n], 4) for n in STEPS})

# %%
figure, (left, right) = widgets.axes(2, width=4.2)
for solver in ("ddim", "dpm++"):
    left.loglog(STEPS, [quality[solver, n] for n in STEPS], "o-", label=solver)
    right.loglog(STEPS, [1000 * seconds[solver, n] for n in STEPS], "o-", label=solver)
left.axhline(max(floor, 1e-5), color=widgets.COLOURS["data"], linestyle="--", label="floor")
left.set(xlabel="steps", ylabel="energy distance to the truth")
right.set(xlabel="steps", ylabel="milliseconds for 1500 points")
left.legend(frameon=False)
widgets.show(figure, "distance falls with steps, time grows in proportion")
a, b = quality["ddim", 10], quality["dpm++", 10]
question.check("equal" if 0.8 < a / b < 1.25 else "ddim" if a < b else "dpm++")
assert quality["ddim", 1] > 20 * quality["ddim", 50], "one step is a dot"
assert abs(quality["ddim", 50] - quality["ddim", STEPS[-1]]) < floor
assert quality["dpm++", 2] > 10 * quality["dpm++", 10]
assert all(abs(quality["ddim", n] - quality["dpm++", n]) < 1e-4 for n in (1, 2)), "no answer before to remember"

# %% [markdown]
# Time is proportional to steps, whatever the solver; quality is not. From 50 steps on you pay for nothing one could see.
# Below four steps both fall off a cliff. (At one and two steps they are equal: there is no answer before to remember.)
#
# Is the library's solver the textbook's? The same teacher through `diffusers`' own scheduler, from the same noise:

# %%
ddpm_teacher = toy.Mixture(toy.ring(8, radius=2.0), 0.3, schedule.ddpm())
ours = sample.solve(ddpm_teacher, noise, solver="ddim", steps=20)
theirs = sample.through_diffusers(ddpm_teacher, sample.diffusers_scheduler(ddpm_teacher, "ddim"), noise, steps=20)
print(f"largest difference: {(ours - theirs).abs().max():.1e}")
assert torch.allclose(ours, theirs, atol=1e-2)

# %% [markdown]
# ## On pictures
#
# The bundled teacher draws pictures of 64 by 64 pixels. Same solvers, same slider. Each step is now a call of a real
# network, and time counts.

# %%
pictures = distill.load(distill.bundled("teacher"))
PROMPTS = ["a large red star on a white background", "a small blue ring on a yellow background, top left"]
PROMPTS += ["a large green heart on a pink background, center", "a small orange square on a gray background"]
TRIED = widgets.size([1, 2, 4, 10, 20, 50], [1, 2, 4, 10])
images, cost = {}, {}
for steps in TRIED:
    start = time.perf_counter()
    images[steps] = pictures.sample(PROMPTS, torch.Generator().manual_seed(3), steps=steps)
    cost[steps] = time.perf_counter() - start
    print(f"{steps:3d} steps: {cost[steps]:.2f} s for {len(PROMPTS)} pictures")
assert cost[TRIED[-1]] > 2 * cost[1]

# %%
_ = widgets.explore(lambda steps: widgets.sheet({f"{steps} steps": images[steps]}), steps=TRIED)

# %%
widgets.compare(images[1][0], images[TRIED[-1]][0], ("one step", f"{TRIED[-1]} steps"), zoom=3)
best = images[TRIED[-1]]
apart = {n: (images[n] - best).square().mean().sqrt().item() for n in TRIED[:-1]}
print("root mean square difference to the most steps:", {n: round(v, 3) for n, v in apart.items()})
assert apart[1] > 1.5 * apart[TRIED[-2]]

# %% [markdown]
# Colours come first, shapes next, fine detail last: already one step knows the background. What it cannot know is
# *where exactly* the edge is, because for this noise many pictures are still possible, and it draws the mean of all.
#
# **No solver can mend that.** A solver follows the teacher's curve; one straight piece can only go where the *first*
# answer points, and that is a mean. To reach a sharp picture in one call, the net itself must give another answer. It
# has to be trained to: that is distillation, and the rest of this course.
#
# ## Where the curve bends
#
# How much does the teacher change its mind along the way? Here is the distance between its answers and its last one.

# %%
answers = []
sample.solve(teacher, noise, solver="ddim", steps=50, callback=lambda i, x0: answers.append(x0))
change = [(x0 - answers[-1]).norm(dim=1).mean().item() for x0 in answers]
figure, ax = widgets.axes(width=4.5)
widgets.curves(
    ax, [1 - i / 50 for i in range(50)], {"": change}, "time t (right: noise)", "distance to the last answer"
)
widgets.show(figure, "the answers stay in the middle until t is about a half, then decide")
late = next(i for i, c in enumerate(change) if c < change[0] / 2)
print(f"half of the way to the last answer is made at t = {1 - late / 50:.2f}")
assert 0.2 < 1 - late / 50 < 0.9

# %% [markdown]
# ## Exercises
#
# **1.** Spend four steps of DDIM better: `sample.solve(teacher, noise, solver="ddim", times=[1.0, 0.75, 0.5, 0.25])` is
# the default grid. Find four times that give a smaller distance. Are they better for `dpm++`, too?
#
# <details><summary>Solution</summary>
#
# Put them where the curve above bends, around the middle, for example `[1.0, 0.7, 0.5, 0.3]`; then let the last step
# start with little noise. Measure with `distance(x, truth)`. For `dpm++` they are not: it foresees the bend, and an even
# grid suits it.
# </details>
#
# **2.** Why does `solve` end with the plain answer $x_0$ and not with one more mixing?
#
# <details><summary>Solution</summary>
#
# The next level would be $t = 0$, where nothing is mixed in: $\alpha = 1$, $\sigma = 0$. That *is* the plain answer.
# </details>

# %% [markdown]
# ## References
#
# - Song and others, *Denoising diffusion implicit models* (2020): [arXiv 2010.02502](https://arxiv.org/abs/2010.02502).
# - Lu and others, *DPM-Solver++* (2022): [arXiv 2211.01095](https://arxiv.org/abs/2211.01095).
# - Karras and others, *Elucidating the design space* (2022), on grids of times: [arXiv 2206.00364](https://arxiv.org/abs/2206.00364).
#
# **Next:** [chapter 4](04_without_a_coach.ipynb) trains a first student, and it goes wrong in an instructive way.
# (Chapter 3 is kept for progressive distillation.)
