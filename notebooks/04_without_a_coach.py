# %% [markdown]
# # 4. Without a coach
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/04_without_a_coach.ipynb)
#
# **You will learn** the simplest way to train a student from a teacher, *score distillation*; watch it collapse; and
# see in one line of algebra why it must.
#
# **You need** [chapter 1](01_a_teacher_you_can_trust.ipynb): what a noisy point is, and what a teacher answers.
# **Time:** 2 minutes to run, 20 to read.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # on Colab this installs OneStep; elsewhere the cell does nothing
    url = "onestep[notebooks] @ git+https://github.com/onestep-diffusion/onestep"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", url], check=True)

# %%
import torch

from distill import SDS, SDSOptions, TrainOptions, schedule, toy, train, widgets

teacher = toy.Mixture(toy.ring(8, radius=2.0), 0.3, schedule.flow())  # eight blobs on a ring; its answers are exact
z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(3))


def start(lr=5e-3):
    student = toy.Student(generator=torch.Generator().manual_seed(0))
    method = SDS(SDSOptions(guidance=1.0, lr=lr), student, teacher)
    points = {"cond": None, "shape": (256, 2)}
    return train(method, lambda step, generator: dict(points), TrainOptions(steps=widgets.size(500, 250)))


def draw(ax, step):
    with torch.no_grad():
        x = step.ema(z[:1500])
    widgets.points(widgets.plane(ax, "the student, one step from noise"), x, "student")
    ax.scatter(*teacher.means.T, marker="+", s=60, color=widgets.COLOURS["teacher"])


run = widgets.dashboard(start, draw, ["x_std", "student_loss"], "A student without a coach", lr=[5e-3, 1e-3, 2e-2])

# %% [markdown]
# The crosses are where the teacher draws. The student began as a wide cloud of noise and ended as a heap in the
# middle, where the teacher draws *nothing*. And `student_loss` looks splendid.
#
# Before we ask why, let us be sure of it in numbers.

# %%
last = await run.finished()
with torch.no_grad():
    x = last.ema(z)
truth = teacher.sample(4000, torch.Generator().manual_seed(5))


def shares(points):
    """Of each blob, the share of points no farther than two of its standard deviations."""
    distance, blob = torch.cdist(points, teacher.means).min(1)
    return torch.bincount(blob[distance < 2 * teacher.std], minlength=8) / len(points)


def spread(points):
    """Root mean square distance from the middle of the points."""
    return points.var(0).sum().sqrt().item()


for name, points in {"teacher": truth, "student": x}.items():
    print(f"{name}: spread {spread(points):.2f}, in each blob", [f"{s:.2f}" for s in shares(points)])
assert shares(truth).min() > 0.09, "the teacher draws in all eight blobs"
assert shares(x).max() < 0.02, "the student draws in none"
assert spread(x) < 0.4 * spread(truth)

# %% [markdown]
# ## What was asked of it
#
# The student turns noise into a point $x$. We mix noise of level $t$ into it and get $x_t$. The teacher is asked
# what it always is asked: *from which point did this come?* Its answer $D_T(x_t, t)$ is the mean of all of its points
# that could have led to $x_t$. Then the point is moved a little towards the answer, against the direction
#
# $$ g = w(t)\,\bigl(x - D_T(x_t, t)\bigr) $$
#
# with a plain number $w(t)$ that says how much noise level $t$ counts. It sounds reasonable: *make the picture more
# like what the teacher sees in it*. It is called score distillation sampling, SDS for short. (`guidance=1.0` above
# switches off something that chapter 6 explains; the *spread* is the standard deviation.) Here are its lines:

# %%
import inspect

print(inspect.getsource(SDS.coach_says))

# %% [markdown]
# In [the next chapter](05_the_coach.ipynb) something better will stand where these lines return `x` itself. That is
# the whole difference between the two methods in the library.
#
# ## Why it collapses
#
# Take the simplest teacher: one blob in one dimension, with mean $m$ and spread $s$. Its best answer is a compromise
# between the noisy point and the mean. Averaged over the noise, it is
#
# $$ D_T = m + k\,(x - m) \qquad\text{with}\qquad k = \frac{\alpha^2 s^2}{\alpha^2 s^2 + \sigma^2} $$
#
# where $\alpha$ is how much of the point is left in $x_t$ and $\sigma$ how much noise was added. The share $k$ lies
# between 0 and 1. Put it into $g$:
#
# $$ g = w\,(1 - k)\,(x - m) $$
#
# *Every* point is pulled to the mean, at every noise level, always. Nothing pushes back.

# %%
question = widgets.predict(
    "One blob with mean 2 and spread 0.5. Where does the spread of an SDS student end?", ["at 0.5", "at 1", "at 0"]
)


# %%
class Line(torch.nn.Module):
    """x = mean + spread z, the smallest student there is."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread = torch.nn.Parameter(torch.tensor(-1.0)), torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, z, cond=None):
        return self.mean + self.spread * z


line, blob_teacher = Line(), toy.Gaussian(2.0, 0.5, schedule.flow())
method = SDS(SDSOptions(guidance=1.0, lr=3e-2), line, blob_teacher)
path = []
for _ in train(method, lambda step, g: {"cond": None, "shape": (256, 1)}, TrainOptions(steps=400)):
    path.append((line.mean.item(), line.spread.item()))
means, spreads = zip(*path)
question.check("at 0" if abs(spreads[-1]) < 0.1 else "at 0.5")
assert abs(means[-1] - 2) < 0.1 and abs(spreads[-1]) < 0.1

# %%
figure, ax = widgets.axes(width=5)
widgets.curves(ax, range(400), {"mean (teacher: 2)": means, "spread (teacher: 0.5)": spreads}, "step", "value")
widgets.show(figure, "the mean rises to 2, the spread falls to 0")

# %% [markdown]
# The mean arrives, the spread dies. In pictures: for one prompt the student draws one picture, whatever the noise.
# Often a pretty one. SDS was invented to make *one* thing, a 3-D object that fits a prompt, and there it does no harm.
# A generator needs the spread.
#
# ## Can a better setting save it?
#
# Perhaps the noise levels were badly chosen: in the run above $t$ went up to 0.98, nearly pure noise. The slider tries
# smaller windows of $t$, down to very little noise. Look for one that keeps eight blobs.


# %%
def window(t_max):
    student = toy.Student(generator=torch.Generator().manual_seed(0))
    method = SDS(SDSOptions(guidance=1.0, lr=5e-3, t_max=t_max), student, teacher)
    *_, last = train(method, lambda step, g: {"cond": None, "shape": (256, 2)}, TrainOptions(steps=200))
    with torch.no_grad():
        return last.ema(z)


def draw_window(t_max):
    figure, ax = widgets.axes(width=3.4, height=3.5)
    widgets.points(widgets.plane(ax, f"t up to {t_max:g}"), found[t_max], "student")
    ax.scatter(*teacher.means.T, marker="+", s=60, color=widgets.COLOURS["teacher"])
    return figure


found = {t_max: window(t_max) for t_max in widgets.size([0.98, 0.7, 0.5, 0.3, 0.1], [0.98, 0.3])}
_ = widgets.explore(draw_window, t_max=list(found))

# %%
for t_max, points in found.items():
    share = shares(points)
    print(f"t up to {t_max:4g}: {(share > 0.02).sum()} of 8 blobs, spread {spread(points):.2f}")
    assert share.min() < 0.02 and spread(points) < 0.6 * spread(truth)

# %% [markdown]
# With much noise the teacher cannot tell its blobs apart, its answer is the middle, and there the heap lies. With less
# noise the heap leaves the middle and slides along the ring. With very little noise every point sits in the nearest
# blob, but the student was a heap long before, so it is the *same* blob for all.
#
# No window of $t$ keeps the ring. A pull alone has no balance; something must push back.

# %% [markdown]
# ## A trap for judges
#
# Ask the teacher how likely the student's points are, one at a time, and a collapsed student can look *better* than
# the truth. Take the one-blob case: a point exactly in the middle is the likeliest of all.

# %%
collapsed = torch.full((4000,), means[-1]) + spreads[-1] * torch.randn(4000, generator=torch.Generator().manual_seed(6))
real = 2.0 + 0.5 * torch.randn(4000, generator=torch.Generator().manual_seed(7))
score = {
    name: -(((v - 2.0) / 0.5) ** 2 / 2).mean().item() for name, v in {"real": real, "collapsed": collapsed}.items()
}
print({name: round(v, 2) for name, v in score.items()}, "(log-likelihood, without its constant)")
assert score["collapsed"] > score["real"]

# %% [markdown]
# Never judge a generator by one picture at a time. Look at many noises of one prompt, and measure their spread.
#
# ## Exercises
#
# **1.** Start `Line` with a spread of 0 instead of 1.5. What changes at the end?
#
# <details><summary>Solution</summary>
#
# Nothing: the end is the same for every start, since the pull is towards the mean from everywhere. Only the way there
# is shorter.
# </details>
#
# **2.** A friend proposes to add noise to the student's points at the end, to restore the spread. In one blob that
# works. Why not with eight?
#
# <details><summary>Solution</summary>
#
# Noise makes one wide heap, not eight small ones. Which blob a point belongs to must be decided by its $z$, and the
# student has forgotten how.
# </details>

# %% [markdown]
# ## References
#
# - Poole and others, *DreamFusion* (2022), where SDS comes from: [arXiv 2209.14988](https://arxiv.org/abs/2209.14988).
# - Wang and others, *ProlificDreamer* (2023), which names the collapse and cures it: [arXiv 2305.16213](https://arxiv.org/abs/2305.16213).
# - Song and others, *Score-based generative modeling* (2020), on teachers and scores: [arXiv 2011.13456](https://arxiv.org/abs/2011.13456).
#
# **Next:** [chapter 5](05_the_coach.ipynb) adds the force that pushes back. Compare its first picture with this one's.
