# %% [markdown]
# # 10. Four bits
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/10_four_bits.ipynb)
#
# **You will learn** to round a network to four bits a weight: by hand, four ways, ten lines each; then with the library.
# And why a student that predicts noise breaks in four bits while one that predicts the picture does not.
#
# **You need** [chapter 1](01_a_teacher_you_can_trust.ipynb), the part about `out`. **Time:** 3 minutes to run, 30 to
# read.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # on Colab this installs OneStep; elsewhere the cell does nothing
    url = "onestep[notebooks] @ git+https://github.com/onestep-diffusion/onestep"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", url], check=True)

# %%
import copy

import torch

import distill
from distill import widgets

student = distill.load(distill.bundled("student"))
PROMPTS = ["a large yellow star on a blue background", "a small red ring on a black background, top left"]
PROMPTS += ["a large green heart on a white background", "a small white circle on a brown background, center"]


def rounded(bits):
    model = distill.load(distill.bundled("student"))
    if bits < 16:
        distill.quantize_(model.net, distill.Quantize(method="rtn", bits=bits))
    return model.sample(PROMPTS, torch.Generator().manual_seed(1))


pictures = {bits: rounded(bits) for bits in (16, 8, 4, 3, 2)}
_ = widgets.explore(lambda bits: widgets.sheet({f"{bits} bits": pictures[bits]}), bits=list(pictures))

# %% [markdown]
# Sixteen bits a weight are what the file holds. With four, a quarter, you have to look twice; at two it is over. This
# chapter is about what happens in between, and how to do it well.
#
# ## Round to nearest, by hand
#
# A layer of a net is a table of weights $W$; it turns inputs $x$ into outputs $W x$. Take 64 neighbours in a row of $W$,
# a *group*. Cut the way from its smallest to its largest weight into 15 equal steps; store for each weight only the
# number of the nearest step, 0 to 15: four bits. For the group store the length of a step (*scale*) and where they
# start. That is all:


# %%
def round_group(w, bits=4, group=64):
    g = w.view(len(w), -1, group)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((g - low) / scale).round()
    return (codes * scale + low).view_as(w)


linear = {n: m for n, m in student.net.named_modules() if isinstance(m, torch.nn.Linear) and ".ff." in n}
fits = {n: m for n, m in linear.items() if m.in_features % 128 == 0}  # whole groups
name, layer = max(fits.items(), key=lambda item: item[1].weight.numel())
W = layer.weight.detach().float()
by_hand = round_group(W)
print(f"a layer of {W.shape[0]} x {W.shape[1]} weights; error {(by_hand - W).norm() / W.norm():.3f} of its size")

# %%
question = widgets.predict("Groups of 16 in place of 64: what happens to the error?", ["smaller", "the same", "larger"])

# %%
sizes = [g for g in (16, 32, 64, 128) if W.shape[1] % g == 0]
errors = {g: ((round_group(W, group=g) - W).norm() / W.norm()).item() for g in sizes}
cost = {g: 4 + 32 / g for g in sizes}  # two numbers of 16 bits a group
for g in sizes:
    print(f"groups of {g:3d}: error {errors[g]:.3f}, {cost[g]:.2f} bits a weight")
question.check("smaller" if errors[16] < 0.95 * errors[64] else "the same")
assert errors[16] < errors[32] < errors[64]

# %% [markdown]
# Small groups have small ranges and so finer steps, but pay for their scales. Groups of 64 cost half a bit a weight.
#
# The library's `round_to_nearest` does the same and stores two codes in a byte. Unpacked, both agree up to the 16 bits
# in which scales are stored:

# %%
from distill.packed.weight import unpack_nibbles
from distill.quantize.rounding import round_to_nearest

q = round_to_nearest(W, bits=4, group=64)
print(f"{q.codes.dtype} codes of shape {tuple(q.codes.shape)}, {q.bits_per_weight:.2f} bits a weight with all scales")
print("first byte:", q.codes[0, 0].item() & 255, "holds codes", unpack_nibbles(q.codes)[0, :2].tolist())
difference = ((q.dequantize() - by_hand).norm() / W.norm()).item()
print(f"library against by hand: {difference:.4f}")
assert difference < 0.02 and 4.4 < q.bits_per_weight < 4.6

# %% [markdown]
# ## What counts is the output
#
# Nobody looks at weights. What counts is $W x$, for the inputs $x$ that this layer really meets. So run the student and
# watch them: this is *calibration*.

# %%
from distill.quantize.calibrate import collect

calibrate = lambda: student.sample(PROMPTS * 4, torch.Generator().manual_seed(2))
stats = collect(student.net, {name: name}, calibrate)[name]
X = stats.rows  # inputs of the layer, one a row


def output_error(Wq):
    return ((X @ (Wq - W).T).norm() / (X @ W.T).norm()).item()


size = stats.mean  # mean |x| of each input channel
print(f"{len(X)} inputs kept; the largest channel is {size.max() / size.median():.1f} times the median one")
print(f"round to nearest: output error {output_error(by_hand):.4f}")

# %% [markdown]
# Some input *channels*, the coordinates of $x$, are larger than others. An error in a weight that meets a large input
# costs more. Three ideas use that.
#
# **AWQ**: multiply the columns of $W$ by $s$ and divide the inputs by $s$; nothing changes, except that columns with a
# large $s$ are rounded more finely. Take $s = \text{size}^a$ and try values of $a$:


# %%
def awq(W, bits=4):
    best = (output_error(round_group(W, bits)), 0.0, round_group(W, bits))
    for a in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        s = size.clamp(min=1e-4 * size.max()) ** a
        s = s / (s.max() * s.min()).sqrt()
        candidate = round_group(W * s, bits) / s
        best = min(best, (output_error(candidate), a, candidate), key=lambda b: b[0])
    return best


error_awq, a, W_awq = awq(W)
print(f"AWQ: output error {error_awq:.4f} at a = {a}")
assert error_awq <= output_error(by_hand)

# %% [markdown]
# **SmoothQuant** goes one further and rounds the *inputs*, too, so that a processor can multiply whole numbers. Inputs
# have outliers, weights have few, so part of the trouble is moved from one to the other:
# $s = \max|x|^{1/2} / \max|w|^{1/2}$ in every channel.


# %%
def to_eight(v):  # each row on a grid of its own, -127..127
    step = v.abs().amax(1, keepdim=True) / 127
    return (v / step).round() * step


def w8a8(s):
    return ((to_eight(X / s) @ to_eight(W * s).T - X @ W.T).norm() / (X @ W.T).norm()).item()


floor = lambda v: v.clamp(min=1e-4 * v.max())
s = (floor(stats.peak) / floor(W.abs().amax(0))).sqrt()
print(f"eight bits for weights and inputs: plain {w8a8(torch.ones_like(s)):.4f}, smoothed {w8a8(s):.4f}")
assert min(w8a8(s), w8a8(torch.ones_like(s))) < output_error(by_hand)  # eight bits are far more than four

# %% [markdown]
# **Low rank**: what rounding leaves over is itself a table. Keep its most important part as the product of two thin
# tables in 16 bits, and add their product. Important means: for inputs of the size we saw.


# %%
def low_rank(W, rank=16, bits=4):
    U, S, V = torch.linalg.svd(W * size, full_matrices=False)
    branch = (U[:, :rank] * S[:rank]) @ V[:rank] / size.clamp(min=1e-6)
    return branch + round_group(W - branch, bits)


table = {"round to nearest": output_error(by_hand), "AWQ": error_awq, "low rank, 16": output_error(low_rank(W))}
for method, error in table.items():
    print(f"{method:18s} {error:.4f}")
assert table["low rank, 16"] < table["round to nearest"]

# %% [markdown]
# ## With the library
#
# The same on all layers: `quantize_` for a net in memory, `distill quantize` for a file. `auto` is AWQ with a search for
# the best range of each group. Does it matter for the picture? Measure it there.


# %%
def picture_error(**options):
    model = copy.copy(student)
    model.parts = {**student.parts, student.main: copy.deepcopy(student.net)}
    net = model.net
    run = (lambda: model.sample(PROMPTS * 4, torch.Generator().manual_seed(2))) if options.pop("see", False) else None
    distill.quantize_(net, distill.Quantize(**options), run=run)
    made = model.sample(PROMPTS, torch.Generator().manual_seed(1))
    return (made - pictures[16]).square().mean().sqrt().item()


found = {"4 bits, nearest": picture_error(method="rtn"), "4 bits, auto": picture_error(method="auto", see=True)}
found["3 bits, nearest"] = picture_error(method="rtn", bits=3)
for how, error in found.items():
    print(f"{how:16s} root mean square error of a pixel {error:.3f} (a pixel goes from -1 to 1)")
assert found["4 bits, auto"] < found["4 bits, nearest"] < found["3 bits, nearest"]

# %% [markdown]
# ## Why a noise-predicting student breaks
#
# A one-step student calls its net once, at the noisiest time. Whatever the net says is turned into the picture by
# $x_0 = \text{skip}\cdot x_t + \text{out}\cdot\text{net}$. Suppose rounding makes the net's output wrong by a few
# percent. In chapter 1 you saw `out` for four kinds of nets.

# %%
question = widgets.predict(
    "4 % wrong in the net of a noise-predicting student at t = 1: in the picture?", ["4 %", "58 %"]
)

# %%
from distill.denoiser import from_x0, to_x0
from distill.schedule import ddpm

schedule, t_in, seed = ddpm(), torch.ones(256), torch.Generator().manual_seed
x0, z = torch.randn(2, 256, 64, generator=seed(3))
slip = torch.randn(256, 64, generator=seed(4))
shown = {}
for prediction in ("x0", "v", "flow", "eps"):
    said = from_x0(x0, z, t_in, schedule, prediction)
    wrong = said + 0.04 * said.std() * slip
    shown[prediction] = ((to_x0(wrong, z, t_in, schedule, prediction) - x0).norm() / x0.norm()).item()
    print(f"{prediction:5s}: the picture is wrong by {shown[prediction]:.0%}")
question.check("58 %" if shown["eps"] > 0.3 else "4 %")
assert max(shown["x0"], shown["v"], shown["flow"]) < 0.07 and shown["eps"] > 0.4

# %% [markdown]
# A teacher's later steps see what the first one spoiled and can repair it. A student called once has no later steps. So
# a student meant for four bits predicts $x_0$, $v$ or flow; or it is called where `out` is small; or it gets eight bits.
# `distill info student` says what yours predicts:

# %%
print(f"the bundled student predicts {student.meta.prediction}, is called at {student.meta.t_in:g}")
picture, sixteen = pictures[4][0], pictures[16][0]
widgets.compare(sixteen, picture, ("16 bits", "4 bits"), zoom=4)

# %% [markdown]
# ## Exercises
#
# **1.** Write `round_group` with a scale alone, no start: codes -8..7 times a scale. When is it better?
#
# <details><summary>Solution</summary>
#
# `scale = g.abs().amax(-1, keepdim=True) / 8` and `(g / scale).round().clamp(-8, 7) * scale`. It saves 16 bits a group,
# so groups can be half as large for the same size. It is worse where all weights of a group have one sign.
# </details>
#
# **2.** How many bits a weight does the low-rank branch of rank 16 cost in this layer?
#
# <details><summary>Solution</summary>
#
# `16 * 16 * (W.shape[0] + W.shape[1]) / W.numel()`. In a layer of 256 by 256 that is 2 bits, a lot; in one of 4096 by
# 4096 it is an eighth of a bit.
# </details>

# %% [markdown]
# ## References
#
# - Lin and others, *AWQ* (2023): [arXiv 2306.00978](https://arxiv.org/abs/2306.00978).
# - Xiao and others, *SmoothQuant* (2022): [arXiv 2211.10438](https://arxiv.org/abs/2211.10438).
# - Li and others, *SVDQuant* (2024), low rank beside four bits: [arXiv 2411.05007](https://arxiv.org/abs/2411.05007).
#
# **Next:** [chapter 11](11_how_fast_is_it.ipynb) measures what four bits and one step do for speed. All formats and
# figures: [docs/four_bit.md](../docs/four_bit.md).
