# %% [markdown]
# # 11. How fast is it really
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/11_how_fast_is_it.ipynb)
#
# **You will learn** to measure speed so that somebody else gets the same number; what a single picture costs and what
# many cost; whether memory or arithmetic is the limit; and why, in one step, the decoder becomes the bottleneck.
#
# **You need** [chapter 0](00_one_step_and_why.ipynb). **Time:** 2 minutes to run, 30 to read. All numbers are of *your*
# machine.

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

student = distill.load(distill.bundled("student"))
cond, seed = student.encode(["a large yellow star on a blue background"]), torch.Generator().manual_seed
z = torch.randn(student.shape(1), generator=seed(0))


@torch.no_grad()
def times(work, n):
    found = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        found.append(1000 * (time.perf_counter() - start))
    return found


draw_one = lambda: student.decode(student.latents(z, cond))
runs = times(draw_one, widgets.size(120, 30))
figure, ax = widgets.axes(width=6)
ax.plot(runs, ".-", color=widgets.COLOURS["student"], linewidth=0.6)
ax.set(xlabel="call", ylabel="milliseconds for one picture", ylim=(0, None))
widgets.show(figure, "call by call: the first is slow, the others vary")

# %% [markdown]
# The same picture, again and again; no two calls take equally long. The first ones are slow: memory is fetched,
# libraries choose their kernels. Later ones vary with whatever else the machine does. So a speed is not a number but a
# distribution, and an honest report says which part of it is meant.
#
# ## Percentiles
#
# Sort the calls after a warm-up. The *median* (p50) is the middle one: half were faster. The *ninetieth percentile*
# (p90) is what one call in ten exceeds. The mean is pulled up by a few bad calls; a person who waits notices those too.

# %%
question = widgets.predict("Which is larger?", ["median", "p90"])

# %%
from distill import bench

warm = runs[5:]
p50, p90, mean = bench.percentile(warm, 50), bench.percentile(warm, 90), sum(warm) / len(warm)
low, high = bench.percentile_range(warm, 50)  # where the median of all calls to come lies, with 95 % confidence
print(
    f"first call {runs[0]:.1f} ms; then median {p50:.1f} (between {low:.1f} and {high:.1f}), p90 {p90:.1f}, mean {mean:.1f}"
)
question.check("p90" if p90 > p50 else "median")
assert min(warm) <= low <= p50 <= high and p50 <= p90

# %% [markdown]
# On a GPU there is one more trap: calls return before the work is done. Without `torch.cuda.synchronize()` before each
# look at the clock you measure how fast work is *ordered*.
#
# ## One at a time, or many at once
#
# Two questions that sound alike. *Single stream*: one person waits for one picture; the answer is a latency.
# *Offline*: a thousand pictures are wanted by tomorrow; the answer is a throughput, pictures a second, at the best batch
# size.

# %%
BATCHES = widgets.size([1, 2, 4, 8, 16, 32], [1, 4, 16])
batched = {}
for b in BATCHES:
    zb, cb = torch.randn(student.shape(b), generator=seed(1)), student.encode(["a small red ring"] * b)
    work = lambda zb=zb, cb=cb: student.decode(student.latents(zb, cb))
    times(work, 2)
    batched[b] = sorted(times(work, widgets.size(9, 3)))[widgets.size(4, 1)]
rate = {b: 1000 * b / t for b, t in batched.items()}
figure, (left, right) = widgets.axes(2, width=4)
left.plot(BATCHES, list(batched.values()), "o-", color=widgets.COLOURS["first"])
left.set(xlabel="batch size", ylabel="milliseconds until all are done", ylim=(0, None))
right.plot(BATCHES, list(rate.values()), "o-", color=widgets.COLOURS["second"])
right.set(xlabel="batch size", ylabel="pictures a second", ylim=(0, None))
widgets.show(figure, "time grows with the batch, throughput grows and levels off")
assert batched[BATCHES[-1]] > batched[1]

# %% [markdown]
# Throughput rises with the batch and levels off; latency only grows. Where throughput stops rising, the machine's
# arithmetic is busy. Before that, something else was the limit: moving weights, and the cost of starting each operation.
#
# ## Memory against arithmetic: the roofline
#
# A layer with $N \times K$ weights, called on $M$ rows, does $2MNK$ operations and must read at least $4NK$ bytes of
# weights (in 32 bits). Operations per byte is its *intensity*, here $M/2$. A machine can do so many operations a second
# and read so many bytes a second. With few rows it waits for memory; with many, for arithmetic. The rows are what
# batching adds. We measure on one core.


# %%
def seconds(work):
    work()
    start = time.process_time()  # this process's own time: other programs do not disturb it
    for _ in range(widgets.size(12, 4)):
        work()
    return (time.process_time() - start) / widgets.size(12, 4)


def speed(rows, n=2048):
    a, w, out = torch.randn(rows, n), torch.randn(n, n), torch.empty(rows, n)
    return 2 * rows * n * n / seconds(lambda: torch.matmul(a, w, out=out)) / 1e9  # billions of operations a second


# %%
threads = torch.get_num_threads()
torch.set_num_threads(1)
ROWS = [1, 4, 16, 64, 256]
flops = {rows: speed(rows) for rows in ROWS}
copy_from, copy_to = torch.randn(8_000_000), torch.empty(8_000_000)
bandwidth = 2 * 4 * 8e6 / seconds(lambda: copy_to.copy_(copy_from)) / 1e9
torch.set_num_threads(threads)
intensity = [rows / 2 for rows in ROWS]
figure, ax = widgets.axes(width=5)
ax.loglog(intensity, list(flops.values()), "o", color=widgets.COLOURS["student"], label="measured")
roof = [min(max(flops.values()), i * bandwidth) for i in intensity]
ax.loglog(intensity, roof, "--", color=widgets.COLOURS["data"], label="roof: memory, then arithmetic")
ax.set(xlabel="operations per byte of weights", ylabel="billion operations a second")
ax.legend(frameon=False)
widgets.show(figure, "measured speed follows a slope, then a ceiling")
print(f"memory {bandwidth:.0f} GB/s, arithmetic {max(flops.values()):.0f} GFLOP/s")
assert flops[256] > 1.5 * flops[1]

# %% [markdown]
# One row uses a small part of a core; hundreds of rows use most of it. (Points may lie above the slope: weights that
# fit into the processor's cache need no trip to memory.)
#
# Here is why **four bits** help where they help: they cut the bytes to an eighth of 32 bits, which lifts the slope and
# leaves the ceiling alone. A language model that writes one word at a time lives on the slope. A diffusion model calls
# its layers on every pixel of the latent at once, many rows, and mostly lives under the ceiling; it gains memory first.
#
# ## Attention kernels
#
# *Attention* lets every place look at every other: $n$ places, $n^2$ pairs. Written down plainly, the table of pairs is
# stored, read, stored again. A fused kernel never stores it. Same answer, other time:

# %%
import torch.nn.functional as F


def plain(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


PLACES = widgets.size([64, 256, 1024, 2048], [64, 256, 1024])
pair = {"plain": [], "fused": []}
for n in PLACES:
    q, k, v = torch.randn(3, 1, 4, n, 64, generator=seed(2))
    assert torch.allclose(plain(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-4)
    for name, kernel in (("plain", plain), ("fused", F.scaled_dot_product_attention)):
        times(lambda: kernel(q, k, v), 2)  # noqa: B023 (called at once)
        pair[name].append(min(times(lambda: kernel(q, k, v), widgets.size(7, 3))))  # noqa: B023
figure, ax = widgets.axes(width=4.5)
for name, values in pair.items():
    ax.loglog(PLACES, values, "o-", label=name)
ax.set(xlabel="places", ylabel="milliseconds")
ax.legend(frameon=False)
widgets.show(figure, "plain and fused attention over the number of places")
assert pair["plain"][-1] > 4 * pair["plain"][0]

# %% [markdown]
# Four times the places are about sixteen times the pairs. This is why diffusion models work in a *latent space*: a
# picture of 512 by 512 pixels becomes 64 by 64 places before any attention sees it. Count the pairs:

# %%
pixels, places = 512 * 512, 64 * 64
print(f"pairs in pixels {pixels**2:.1e}, in latents {places**2:.1e}: {(pixels / places) ** 2:.0f} times fewer")
assert (pixels / places) ** 2 == 4096

# %% [markdown]
# ## One step moves the bottleneck
#
# A teacher calls its net fifty times and decodes once. Make it one call, and look again at who is slow. The library's own
# clock, `distill bench` as a command, measures every part both ways:


# %%
def query(number, pictures):  # what the first part takes: prompts
    return ["a large yellow star on a blue background"] * pictures


chain = {
    "words": torch.no_grad()(student.encode),
    "network": lambda c: student.latents(z.expand(len(next(iter(c.values()))), -1, -1, -1), c),
    "decoder": torch.no_grad()(student.decode),
}
report = bench.measure("student", chain, query, queries=widgets.size(40, 12), batches=2, batch=4, warmup=2)
print(bench.table(report))
parts = {name: 1000 * bench.percentile(report.single[name], 50) for name in chain}


# %%
def shares(steps):
    figure, ax = widgets.axes(width=5, height=1.7)
    total, left = parts["words"] + steps * parts["network"] + parts["decoder"], 0.0
    for name, colour in (("words", "second"), ("network", "student"), ("decoder", "teacher")):
        part = 100 * parts[name] * (steps if name == "network" else 1) / total
        ax.barh([f"{steps} steps"], [part], left=left, color=widgets.COLOURS[colour], label=f"{name} {part:.0f} %")
        left += part
    ax.set(xlabel="share of the time, %")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


_ = widgets.explore(shares, steps=[50, 20, 4, 1])

# %%
rest = lambda steps: 1 - steps * parts["network"] / (parts["words"] + steps * parts["network"] + parts["decoder"])
print(f"words and decoder: {rest(50):.0%} of the time at 50 steps, {rest(1):.0%} at one")
gain = (parts["words"] + 50 * parts["network"] + parts["decoder"]) / sum(parts.values())
print(f"fifty times fewer calls make it {gain:.0f} times as fast, not fifty")
assert rest(1) > 5 * rest(50) and gain < 50

# %% [markdown]
# This is *Amdahl's law*: what you do not speed up decides in the end. For a one-step Stable Diffusion the decoder can
# take longer than the network; a tiny decoder then brings more than any kernel.
#
# ## Training: memory for time
#
# To compute gradients, every layer's output is kept until the way back. *Gradient checkpointing* keeps few and computes
# the others again: less memory for more time. Count the bytes that are kept:


# %%
def kept(checkpointing):
    teacher = distill.load(distill.bundled("teacher"))
    teacher.net.requires_grad_(True).train()
    (teacher.net.enable_gradient_checkpointing if checkpointing else teacher.net.disable_gradient_checkpointing)()
    x, t, c = (
        torch.randn(teacher.shape(4), generator=seed(3)),
        torch.full((4,), 0.9),
        teacher.encode(["a red star"] * 4),
    )
    held, own = {}, {p.data_ptr() for p in teacher.net.parameters()}

    def keep(v):
        if v.data_ptr() not in own:
            held[v.data_ptr()] = v.numel() * v.element_size()
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        loss = teacher.denoiser(x, t, c).square().mean()
    start = time.perf_counter()
    loss.backward()
    return sum(held.values()) / 1e6, 1000 * (time.perf_counter() - start)


usual, checkpointed = kept(False), kept(True)
print(f"usual: {usual[0]:.1f} MB kept, way back {usual[1]:.0f} ms")
print(f"checkpointed: {checkpointed[0]:.1f} MB kept, way back {checkpointed[1]:.0f} ms")
assert checkpointed[0] < 0.7 * usual[0]

# %% [markdown]
# ## Exercises
#
# **1.** At which batch size does your machine reach nine tenths of its best throughput?
#
# <details><summary>Solution</summary>
#
# `next(b for b in BATCHES if rate[b] > 0.9 * max(rate.values()))`. On a CPU with two cores that is small; on a GPU it can
# be dozens.
# </details>
#
# **2.** The network is made twice as fast. How much faster is a picture in one step, on your machine?
#
# <details><summary>Solution</summary>
#
# `sum(parts.values()) / (sum(parts.values()) - parts["network"] / 2)`: Amdahl's law with the shares above. Never twice.
# </details>

# %% [markdown]
# ## References
#
# - Williams and others, *Roofline* (2009): [doi 10.1145/1498765.1498785](https://doi.org/10.1145/1498765.1498785).
# - Reddi and others, *MLPerf inference benchmark* (2019), single stream and offline: [arXiv 1911.02549](https://arxiv.org/abs/1911.02549).
# - Dao and others, *FlashAttention* (2022): [arXiv 2205.14135](https://arxiv.org/abs/2205.14135).
# - Chen and others, *Training deep nets with sublinear memory cost* (2016): [arXiv 1604.06174](https://arxiv.org/abs/1604.06174).
#
# **Next:** [chapter 12](12_into_comfyui.ipynb) takes the student into a node graph. Speeds of four bits, measured:
# [docs/four_bit_speed.md](../docs/four_bit_speed.md).
