# %% [markdown]
# # 1. A teacher you can trust
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/01_a_teacher_you_can_trust.ipynb)
#
# **You will learn** how noise is mixed in and taken out; why nets that predict noise, pictures or velocities all say
# the same; and how a diffusion model is trained, on a teacher whose every answer can be checked.
#
# **You need** Python, and what a mean and a normal distribution are. **Time:** 2 minutes to run, 40 to read.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # on Colab this installs OneStep; elsewhere the cell does nothing
    url = "onestep[notebooks] @ git+https://github.com/onestep-diffusion/onestep"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", url], check=True)

# %%
import torch

from distill import sample, schedule, toy, widgets

flow = schedule.flow()
teacher = toy.Mixture(toy.ring(8, radius=2.0), 0.3, flow)  # eight blobs on a ring
seed = torch.Generator().manual_seed
truth = teacher.sample(2000, seed(0))
noise = torch.randn(2000, 2, generator=seed(1))
path = []
sample.solve(teacher, noise, steps=50, callback=lambda i, x0: path.append(x0))

figure, (left, middle, right) = widgets.axes(3, height=3.8)
widgets.points(widgets.plane(left, "the world: eight blobs"), truth)
widgets.points(widgets.plane(middle, "noise"), noise, "fourth")
widgets.points(widgets.plane(right, "noise, denoised in 50 steps"), path[-1], "teacher")
widgets.show(figure, "eight blobs; a round cloud; eight blobs again")

# %% [markdown]
# From the cloud in the middle to the blobs on the right: that is what a diffusion model does. In this chapter the
# "pictures" are points in the plane, so that you can see all of them at once. Nothing else is simplified; the library
# code that runs here runs on pictures in later chapters.
#
# ## Noise in
#
# Take a clean point $x_0$ and a random one $\epsilon$ (each coordinate normal with mean 0 and variance 1). Mix them:
#
# $$ x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon $$
#
# The time $t$ runs from 0, clean, to 1, noise. A *schedule* says how much of each: $\alpha$ falls, $\sigma$ rises. The
# simplest is `schedule.flow()`, a straight line: $\alpha = 1 - t$, $\sigma = t$.


# %%
def noisy(t):
    figure, ax = widgets.axes(width=3.4, height=3.5)
    x_t = flow.noise(truth, torch.full((2000,), t), noise)  # alpha(t) x0 + sigma(t) eps
    widgets.points(widgets.plane(ax, f"t = {t:g}"), x_t, "data")
    return figure


_ = widgets.explore(noisy, t=[0.0, 0.1, 0.25, 0.5, 0.75, 1.0])

# %% [markdown]
# At which $t$ can you no longer tell the blobs apart? A number for it: guess, for each noisy point, the blob it came
# from, by taking the likeliest.

# %%
question = widgets.predict(
    "At t = 0.5, how often is the likeliest blob the right one?", ["< 50 %", "50-90 %", "> 90 %"]
)


# %%
def right(t):
    home = torch.cdist(truth, teacher.means).argmin(1)
    x_t = flow.noise(truth, torch.full((2000,), t), noise)
    return (torch.cdist(x_t, (1 - t) * teacher.means).argmin(1) == home).float().mean().item()


times = [0.05 * i for i in range(1, 20)]
rates = [right(t) for t in times]
figure, ax = widgets.axes(width=4.5)
widgets.curves(ax, times, {"right": rates}, "time t", "share of blobs guessed right")
widgets.show(figure, "a curve from 1 down to one eighth")
question.check("< 50 %" if right(0.5) < 0.5 else "50-90 %" if right(0.5) < 0.9 else "> 90 %")
assert right(0.1) > 0.98 and right(0.95) < 0.3

# %% [markdown]
# ## Noise out
#
# A *denoiser* answers one question: given $x_t$, where did it come from? Many clean points could have led there, so the
# answer is their mean:
#
# $$ D(x_t, t) = \mathbb{E}[\,x_0 \mid x_t\,] $$
#
# read: "the expected value of $x_0$, given $x_t$". For a mixture of normal blobs it can be written down: the mean of the
# blobs' own answers, each weighted by how likely the blob is. `toy.Mixture` is that formula. Let us not believe it but
# count: draw very many points, noise them, and average those that land close to a spot.

# %%
spot, t = torch.tensor([[0.9, 0.5]]), 0.4
many = teacher.sample(2_000_000, seed(2))
x_t = flow.noise(many, torch.tensor([t]), torch.randn(many.shape, generator=seed(3)))
close = (x_t - spot).norm(dim=1) < 0.05
counted, formula = many[close].mean(0), teacher(spot, torch.tensor([t]))[0]
print(f"{close.sum()} points landed there; their origin was on average {counted.tolist()}")
print(f"the formula says {formula.tolist()}")
assert (counted - formula).norm() < 0.05

# %%
figure, axes = widgets.axes(3, width=3.4, height=3.5)
for ax, t in zip(axes, [0.2, 0.5, 0.9]):
    widgets.field(widgets.plane(ax, f"t = {t:g}"), lambda p, t=t: teacher(p, torch.full((len(p),), t)) - p)
widgets.show(figure, "arrows from noisy points to the teacher's answers")

# %% [markdown]
# Arrows lead from a noisy point to the teacher's answer. With little noise, to the nearest blob. With much noise, to the
# middle: when anything is possible, the mean of all is the best guess. **That is why one step of a teacher gives a
# blur.** Many small steps avoid it, since each only has to be right about the next bit of noise.
#
# ## One thing, four ways to say it
#
# Nets are trained to predict different things: the clean $x_0$, the noise $\epsilon$, the velocity
# $v = \alpha\epsilon - \sigma x_0$, the flow $u = \epsilon - x_0$. Once $x_t$ is known, each is a straight-line function of
# the other, so a net that knows one knows all. Two known numbers for each time, *skip* and *out*, lead from what the
# net says to the clean point:
#
# $$ x_0 = \text{skip}(t)\,x_t + \text{out}(t)\cdot\text{net}(x_t) $$

# %%
from distill.denoiser import coefficients, from_x0, to_x0

ddpm, t = schedule.ddpm(), torch.tensor([0.05, 0.5, 1.0])  # Stable Diffusion's schedule
x0, eps = torch.randn(2, 3, 2, generator=seed(4))
x_t = ddpm.noise(x0, t, eps)
for prediction in ("x0", "eps", "v", "flow"):
    said = from_x0(x0, x_t, t, ddpm, prediction)  # what a net of this kind would have to say
    back = to_x0(said, x_t, t, ddpm, prediction)
    out = coefficients(prediction, ddpm, t, x_t)[1] * torch.ones(3, 1)
    print(f"{prediction:5s} comes back within {(back - x0).abs().max():.0e}; out at t = .05, .5, 1:", end=" ")
    print([round(o, 2) for o in out.flatten().tolist()])
    assert torch.allclose(back, x0, atol=1e-4)
assert coefficients("eps", ddpm, t, x_t)[1].abs().max() > 14  # remember this number; chapter 10 needs it

# %% [markdown]
# They say the same, but not with the same *care*: `out` is how much an error of the net is enlarged on its way to the
# picture. A net that predicts noise, asked at the noisiest time of Stable Diffusion's schedule, has its errors
# multiplied by more than 14. In this library losses and methods are written in $x_0$, once; what a net
# predicts is settled where it is wrapped (`distill.from_net`).

# %% [markdown]
# ## Train one
#
# Now forget the formula and learn a denoiser from points alone: draw $x_0$, $t$ and $\epsilon$, mix, and let a small
# net guess $u = \epsilon - x_0$. This is *rectified flow*. Where should $t$ be drawn? All the decisions fall in the
# middle, so many draw from a bell, *logit-normal*: a normal number pressed into (0, 1).
#
# Below, a `Method` of the library: it names the net that is trained and the loss of a step; the loop does the rest. The
# loss is written on $x_0$. Since $x_0 = x_t - t\,u$, an error in $u$ is $t$ times as large in $x_0$; the weight
# $1/t^2$ undoes that.

# %%
from distill import Method, Net, Phase, TrainOptions, from_net, train
from distill.losses import denoising

DRAWS = {"uniform": schedule.uniform(0.001, 0.999), "logit-normal": schedule.logit_normal()}
DRAWS["shifted to noise"] = schedule.shifted(schedule.logit_normal(), 3.0)


class Flow(Method):
    """Rectified flow: the net is a denoiser of the teacher's points."""

    def __init__(self, times):
        self.net, self.times = toy.MLP(hidden=128, generator=seed(5)), times
        self.denoiser = from_net(self.net, flow, "flow")

    @property
    def nets(self):
        return {"student": Net(self.net, lr=3e-3, average=True)}

    def phases(self, step):
        yield Phase("student", self.loss)

    def loss(self, batch, generator):
        x0 = teacher.sample(512, generator)
        t = self.times(512, generator).clamp(0.001, 0.999)
        x_t = flow.noise(x0, t, torch.randn(x0.shape, generator=generator))
        loss = denoising(self.denoiser(x_t, t), x0, 1 / t[:, None] ** 2)  # 1/t^2 on x0 is weight 1 on u
        return loss, {"loss": loss.detach()}


# %% [markdown]
# The training loop is the library's: a generator of steps, the same for every method. The view below draws what it
# yields. A good check while it trains is the loss on *fixed* points, times and noises, the validation loss: unlike the
# training loss it does not jump about. Does it tell quality? We look seven times and compare it with a distance of
# the drawn points to the truth, `gap`: how much farther apart points of different sets are than points of one set, on
# average; 0 where the sets are alike. If loss and distance sort the looks alike, their *rank correlation* is 1; if one
# says nothing about the other, 0.

# %%
FIXED = [teacher.sample(4000, seed(6)), 0.001 + 0.998 * torch.rand(4000, generator=seed(7))]
FIXED.append(flow.noise(FIXED[0], FIXED[1], torch.randn(4000, 2, generator=seed(8))))


@torch.no_grad()
def validation(denoiser):
    x0, t, x_t = FIXED
    return denoising(denoiser(x_t, t), x0, 1 / t[:, None] ** 2).item()


@torch.no_grad()
def gap(a, b):
    """Energy distance of two sets of points, 0 for two like sets; chapter 2 explains it."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def start(t_from):
    for step in train(Flow(DRAWS[t_from]), lambda step, g: {}, TrainOptions(steps=STEPS, betas=(0.9, 0.99))):
        if step.step in LOOKS:
            net = from_net(step.ema, flow, "flow")
            drawn = sample.solve(net, noise, steps=20)
            SEEN.setdefault(t_from, []).append((validation(net), gap(drawn, truth)))
        yield step


STEPS = widgets.size(1500, 400)
LOOKS, SEEN = {STEPS * k // 64 for k in (1, 2, 4, 8, 16, 32, 64)}, {}

# %%
draw = lambda ax, step: widgets.points(
    widgets.plane(ax, "20 steps of the net"), sample.solve(from_net(step.ema, flow, "flow"), noise, steps=20), "student"
)
kinds = {name: name for name in ("logit-normal", "uniform", "shifted to noise")}
run = widgets.dashboard(start, draw, ["loss"], "Rectified flow", t_from=kinds)

# %%
learned = from_net((await run.finished()).ema, flow, "flow")
losses, gaps = zip(*SEEN["logit-normal"][-7:])
print(f"validation loss: exact teacher {validation(teacher):.3f}, ours {losses[-1]:.3f}")
figure, ax = widgets.axes(width=4.5)
ax.semilogy([loss - validation(teacher) for loss in losses], gaps, "o-", color=widgets.COLOURS["student"])
ax.set(xlabel="validation loss above the exact teacher's", ylabel="distance of the points to the truth")
widgets.show(figure, "the lower the loss, the nearer the points")
rank = torch.corrcoef(torch.tensor([losses, gaps]).argsort(1).argsort(1).float())[0, 1].item()
print(f"rank correlation of loss and distance: {rank:.2f}")
assert validation(teacher) < losses[-1] < losses[0] and rank > 0.7

# %% [markdown]
# Two things to take along. No net beats the exact teacher, whose loss is not zero: the noise that is *gone* cannot be
# guessed. And the lower the validation loss, the nearer the points: for a **teacher** the loss tells quality. Remember
# this, because in chapter 5 the student's loss will tell *nothing*.
#
# ## Shift
#
# One more word you will meet. A *shift* by $k$ moves the even grid of times towards noise, which multiplies
# $\sigma/\alpha$ by $k$. Pictures with large flat areas need it: their colour shines through noise that would hide fine
# detail. The bundled teacher has a shift in its schedule, and so have SD3 and FLUX.

# %%
grid = torch.linspace(0.05, 0.95, 50)
plain, moved = schedule.flow(), schedule.flow(shift=3.0)
ratio = (moved.sigma(grid) / moved.alpha(grid)) / (plain.sigma(grid) / plain.alpha(grid))
print(f"sigma/alpha of the shifted schedule over the plain one: {ratio.min():.3f} to {ratio.max():.3f}")
assert torch.allclose(ratio, torch.full_like(ratio, 3.0), rtol=1e-3)

# %% [markdown]
# ## Exercises
#
# **1.** What does the teacher answer at $t = 1$, wherever the noisy point is? Check with `teacher(noise, torch.ones(2000))`.
#
# <details><summary>Solution</summary>
#
# The middle of the ring, (0, 0): at $t = 1$ nothing of $x_0$ is left in $x_t$, so the answer is the mean of all points.
# </details>
#
# **2.** In the view above train with *shifted to noise*. Which part of the picture suffers, and why?
#
# <details><summary>Solution</summary>
#
# The blobs come out less crisp: times with little noise are drawn rarely, and those decide the fine detail. For flat
# pictures that may be a good trade, for this ring it is not.
# </details>

# %% [markdown]
# ## References
#
# - Ho and others, *Denoising diffusion probabilistic models* (2020): [arXiv 2006.11239](https://arxiv.org/abs/2006.11239).
# - Liu and others, *Flow straight and fast* (2022), rectified flow: [arXiv 2209.03003](https://arxiv.org/abs/2209.03003).
# - Karras and others, *Elucidating the design space* (2022): [arXiv 2206.00364](https://arxiv.org/abs/2206.00364).
# - Esser and others, *Scaling rectified flow transformers* (2024), logit-normal times and shift: [arXiv 2403.03206](https://arxiv.org/abs/2403.03206).
#
# **Next:** [chapter 2](02_better_solvers.ipynb) asks how few steps a good solver needs. The formulas are also in
# [docs/theory.md](../docs/theory.md#everything-in-x0).
