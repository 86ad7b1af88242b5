# %% [markdown]
# # 5. The coach
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/05_the_coach.ipynb)
#
# **You will learn** what a second net, the coach, does for a one-step student; why nothing moves in the very first
# step; and that the same thirty lines train points in the plane and pictures.
#
# **You need** [chapter 4](04_without_a_coach.ipynb), which shows what goes wrong without a coach. **Time:** 3 minutes
# to run, 30 to read.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # on Colab this installs OneStep; elsewhere the cell does nothing
    url = "onestep[notebooks] @ git+https://github.com/onestep-diffusion/onestep"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", url], check=True)

# %%
import torch

from distill import VSD, TrainOptions, VSDOptions, schedule, toy, train, widgets

teacher = toy.Mixture(toy.ring(8, radius=2.0), 0.3, schedule.flow())  # eight blobs; its answers are exact
z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(3))  # noise to look at students with
STEPS = widgets.size(1500, 800)


def start(coach_steps):
    seeds = torch.Generator().manual_seed(0)
    student, coach = toy.Student(generator=seeds, waves=32), toy.Coach(teacher, generator=seeds, waves=32)
    rates = {"lr": 5e-3, "coach_lr": 1e-2, "coach_steps": coach_steps}
    method = VSD(VSDOptions(guidance=1.0, weight="dmd", t_max=0.5, **rates), student, coach)
    points = {"cond": None, "shape": (512, 2)}
    return train(method, lambda step, generator: dict(points), TrainOptions(steps=STEPS))


def draw(ax, step):
    with torch.no_grad():
        x = step.ema(z[:1500])
    widgets.points(widgets.plane(ax, "the student, one step from noise"), x, "student")
    ax.scatter(*teacher.means.T, marker="+", s=60, color=widgets.COLOURS["teacher"])


run = widgets.dashboard(start, draw, ["rel_gap", "x_std"], "A student with a coach", coach_steps=[2, 1, 5])

# %% [markdown]
# Every dot is one call of a small net: noise in, a point out. The crosses are the teacher's eight blobs. The student
# goes to all of them, though nobody ever shows it a single point of the teacher's.
#
# Beside it, two readouts. `x_std` is the spread of the student's points, the root mean square of a coordinate.
# `rel_gap` says how far student and teacher are from agreeing; we come to it below.
#
# While it runs you may press *Stop*, *Start* and *Reset*, or move the slider. The next cell waits for the end.

# %%
last = await run.finished()
with torch.no_grad():
    x = last.ema(z)


def shares(points):
    """Of each blob, the share of points no farther than two of its standard deviations."""
    distance, blob = torch.cdist(points, teacher.means).min(1)
    return torch.bincount(blob[distance < 2 * teacher.std], minlength=8) / len(points)


truth = teacher.sample(4000, torch.Generator().manual_seed(5))
for name, points in {"teacher": truth, "student": x}.items():
    print(f"{name}: {shares(points).sum():.2f} in some blob;", [f"{s:.2f}" for s in shares(points)])
assert shares(x).min() > 0.03, "the student lost a blob"
assert widgets.size(0.75, 0.7) < shares(x).sum() < shares(truth).sum(), "most points are in blobs, some on bridges"
assert 0.8 < x.var(0).sum().sqrt() / truth.var(0).sum().sqrt() < 1.2, "its spread should be the teacher's"

# %% [markdown]
# All eight blobs have their share, and the spread is the teacher's. In chapter 4 a student without a coach ended
# in a single heap, in none of them.
#
# It is not perfect: a few more of its points lie outside of blobs than of the teacher's, on bridges *between* two. The
# student is a smooth function of its noise, and noise is one connected cloud, so somewhere it has to cross from blob to
# blob.
#
# Two settings make the crossing quick. Both nets see `waves` of their input, with which steep places are easy to learn.
# And `t_max=0.5` leaves out heavy noise, in which blobs cannot be told apart (the curve of chapter 1). Exercise 3 takes
# them away.

# %% [markdown]
# ## Two opinions about one noisy point
#
# Take a point of the student's and mix noise into it. Now ask two experts: *where did this come from?*
#
# - The **teacher** answers for points of the teacher: the mean of all its points that could have led here.
# - The **coach** answers for points of the *student*: the mean of all the student's points that could have led here.
#
# Where the student draws what the teacher draws, both give the same answer. Where it does not, the difference of the
# two answers is the direction in which to move.

# %% [markdown]
# ## The formula
#
# Write $x$ for a point of the student, $x_t$ for the same point with noise of level $t$ mixed in, $D_T$ for the
# teacher's answer and $D_C$ for the coach's. The student is moved against
#
# $$ g = w(t)\,\bigl(D_C(x_t, t) - D_T(x_t, t)\bigr) $$
#
# Here $w(t)$ is a plain number that says how much noise level $t$ counts. Read it from right to left: go *towards* the
# teacher's answer, and *away* from your own habit. The second half is what chapter 4 lacked: it pushes points out of
# places where the student already draws too many.
#
# Meanwhile the coach is trained like any denoiser, on the student's newest points: guess $x$ from $x_t$, squared error.
# In the library both fit in one method, `distill.VSD`:

# %%
import inspect

source = inspect.getsource(VSD.student_loss)
print(source[: source.index("logs =")])

# %% [markdown]
# `matching_gradient` is the formula above, line by line. `surrogate` turns it into a loss with that gradient, because
# optimisers want a loss. Its *value* means nothing; never choose a student by it.
#
# ## Is the coach right?
#
# Usually nobody could tell. Here we can: the student's points are known, so the exact answer for *them* is a mixture
# with one tiny blob at each. Let us draw, at one noise level, where each expert would send a noisy point.

# %%
t = 0.6
now = toy.Mixture(x[:2000], 0.05, teacher.schedule)  # what a perfect coach would know of this student
coach_net = last.nets["coach"]


def coach(x_t, times):
    return teacher(x_t, times) + coach_net(x_t, teacher.schedule.index(times))  # as toy.Coach


def answers(denoiser, t):
    return lambda p: denoiser(p, torch.full((len(p),), t)) - p  # an arrow from the noisy point to the answer


figure, (left, middle, right) = widgets.axes(3, width=3.4, height=3.5)
by_teacher = widgets.field(widgets.plane(left, "teacher"), answers(teacher, t), "teacher")
by_coach = widgets.field(widgets.plane(middle, "coach"), answers(coach, t), "coach")
exact = widgets.field(widgets.plane(right, "a perfect coach"), answers(now, t), "student")
widgets.show(figure, "arrows of teacher, coach and perfect coach: nearly alike")

# %%
near = (1 - t) * x[:2000] + t * torch.randn(2000, 2, generator=torch.Generator().manual_seed(4))  # where points are
told, true = answers(coach, t)(near), answers(now, t)(near)
error = ((told - true).norm(dim=1).mean() / true.norm(dim=1).mean()).item()
print(f"where the student's noisy points are, the coach is off by {error:.0%} of an arrow")
assert error < 0.35

# %% [markdown]
# Near the student's own points the coach has learned what a perfect one would say. Far out, where no point ever is, it
# never was asked and may say anything; there it does no harm.
#
# Touch it: the slider below moves the noise level. With little noise every point goes to the nearest blob. With much
# noise everybody answers "the middle", and the field says little about single blobs.


# %%
def both(t):
    figure, (left, right) = widgets.axes(2, width=3.2, height=3.3)
    widgets.field(widgets.plane(left, f"teacher, t = {t:g}"), answers(teacher, t), "teacher")
    widgets.field(widgets.plane(right, f"coach, t = {t:g}"), answers(coach, t), "coach")
    return figure


_ = widgets.explore(both, t=[0.2, 0.4, 0.6, 0.8, 0.95])

# %% [markdown]
# ## The first step
#
# Before training the coach is a copy of the teacher. Predict before you run on:

# %%
question = widgets.predict("How far does the student move in its very first step?", ["not at all", "a little", "far"])

# %%
seeds = torch.Generator().manual_seed(0)
student, fresh = toy.Student(generator=seeds, waves=32), toy.Coach(teacher, generator=seeds, waves=32)
method = VSD(VSDOptions(guidance=1.0), student, fresh)
loss, logs = method.student_loss({"cond": None, "shape": (256, 2)}, torch.Generator().manual_seed(1))
loss.backward()
pull = max(p.grad.abs().max().item() for p in student.parameters())
print(f"largest gradient: {pull}, rel_gap: {logs['rel_gap'].item()}")
question.check("not at all" if pull == 0 else "a little")
assert pull == 0 and logs["rel_gap"] == 0

# %% [markdown]
# Both experts say the same, their difference is exactly zero, and the student stands still. It starts to move only
# because the *coach* moves first. So a student that does nothing in its first steps is no error, and the coach has to
# be the quicker learner of the two: [chapter 6](06_keeping_it_stable.ipynb) measures how much quicker.
#
# The readout `rel_gap` shows it: the size of the difference, against the distance from the student's points to the
# teacher's answers. It starts at 0 and rises as soon as the coach knows its student.

# %%
gap = run.history["rel_gap"]
print(f"rel_gap in step 1: {gap[0]:.3f}, its largest in the first 100 steps: {max(gap[:100]):.3f}")
assert gap[0] == 0 and max(gap[:100]) > 0.1

# %% [markdown]
# ## The same lines on pictures
#
# The method never asked what a "point" is. Hand it the bundled teacher, whose points are pictures of 64 by 64 pixels,
# and nothing changes but the nets (here the coach is a full copy of the teacher: `coach="copy"`). We start from the
# teacher itself, called once: that is the blur a student has to get rid of. Half a minute of training is no finished
# student, but it is enough to see the blur go.

# %%
import distill
from distill.tutorial.prompts import shape_batches

picture_teacher = distill.load(distill.bundled("teacher"))
prompts = ["a large red star on a blue background", "a small white ring on a black background, center"] * 4
noise = torch.randn(picture_teacher.shape(8), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def pictures(net):
    generate = distill.one_step(picture_teacher.wrap(net), picture_teacher.time())
    return picture_teacher.decode(generate(noise, picture_teacher.encode(prompts)))


def start_pictures():
    options = VSDOptions(coach="copy", guidance=1.0, lr=5e-4, coach_lr=1e-3)
    batches = shape_batches(picture_teacher, batch_size=8)
    return distill.train_student(picture_teacher, options, batches, TrainOptions(steps=widgets.size(50, 5), ema=0.9))


blurred = pictures(picture_teacher.net)

# %%
picture_run = widgets.dashboard(start_pictures, None, ["coach_ratio", "rel_gap"], "The same method on pictures")

# %%
trained = pictures((await picture_run.finished()).ema)
many = picture_teacher.decode(picture_teacher.latents(noise, picture_teacher.encode(prompts), steps=10))
rows = {"teacher, 1 step": blurred, "student, 1 step": trained, "teacher, 10 steps": many}
widgets.show(widgets.sheet(rows), "three rows of pictures: blurred, sharper, sharp")


# %% [markdown]
# How sharp is sharp? A number that needs no judge: how much neighbouring pixels differ, on average over the row.


# %%
def edges(images):
    return (images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()).item()


for name, images in rows.items():
    print(f"{name:18s} {edges(images):.4f}")
assert edges(trained) > edges(blurred)
assert picture_run.history["rel_gap"][0] < picture_run.history["rel_gap"][-1]  # here, too, the coach had to learn first

# %% [markdown]
# ## Exercises
#
# **1.** What will `x_std` do with a coach that never learns (`coach_lr=1e-12`), and why?
#
# <details><summary>Solution</summary>
#
# Nothing at all. The coach stays the teacher, the difference stays zero, and the student stays the noise it started as,
# with an `x_std` of about 1.
# </details>
#
# **2.** Would a student trained with the perfect coach of this chapter, `now`, need `coach_steps`?
#
# <details><summary>Solution</summary>
#
# No: it is exact at once. But it costs 2000 distances a point and wants the student's points as a list, which no
# picture allows.
# </details>
#
# **3.** Train without `waves`, in the student, then in the coach, and look at the points and at `shares(x).sum()`.
#
# <details><summary>Solution</summary>
#
# Without the student's it draws a ring: a smooth net is slow to become steep. Without the coach's, too: it cannot tell
# a ring from eight blobs, so it has nothing to say against one. Both nets must see what is to be learned.
# </details>

# %% [markdown]
# ## References
#
# - Wang and others, *ProlificDreamer* (2023): the idea of a second, learned score, [arXiv 2305.16213](https://arxiv.org/abs/2305.16213).
# - Nguyen and Tran, *SwiftBrush* (2023): one-step students with a coach of low rank, [arXiv 2312.05239](https://arxiv.org/abs/2312.05239).
# - Yin and others, *Distribution Matching Distillation* (2023): the same gradient, other weights, [arXiv 2311.18828](https://arxiv.org/abs/2311.18828).
# - Luo and others, *Diff-Instruct* (2023), [arXiv 2305.18455](https://arxiv.org/abs/2305.18455).
#
# **Next:** [chapter 6](06_keeping_it_stable.ipynb) breaks this training and repairs it. The formulas behind both are in
# [docs/theory.md](../docs/theory.md).
