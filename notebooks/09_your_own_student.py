# %% [markdown]
# # 9. Your own student
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onestep-diffusion/onestep/blob/main/notebooks/09_your_own_student.ipynb)
#
# **You will learn** to distill a Stable Diffusion: from a `diffusers` folder to a one-step file, with coach
# and student of low rank; what to watch; what it costs in memory; and how to take the result to ComfyUI and to `diffusers`.
#
# **You need** [chapter 5](05_the_coach.ipynb). **Time:** 2 minutes to run, 25 to read. A last section runs the same lines
# on a real Stable Diffusion, if you have a GPU.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # on Colab this installs OneStep; elsewhere the cell does nothing
    url = "onestep[notebooks] @ git+https://github.com/onestep-diffusion/onestep"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", url], check=True)

# %%
import torch

import distill
from distill import widgets

PROMPTS = ["a large red star on a blue background", "a small white ring", "a green heart", "a large yellow circle"]


def start(coach):
    teacher = distill.load(distill.bundled("teacher"))  # any folder or file of yours could stand here
    options = distill.VSDOptions(coach=coach, rank=16, guidance=1.0, lr=5e-4)
    batches = distill.prompt_batches(teacher, PROMPTS, batch_size=8)
    return distill.train_student(teacher, options, batches, distill.TrainOptions(steps=widgets.size(30, 5)))


readouts = ["coach_ratio", "coach_loss", "x_std"]
run = widgets.dashboard(start, None, readouts, "Four lines make a student", coach=["lora", "copy"])

# %% [markdown]
# That is all of it: a teacher, the options of a method, batches of prompts, a loop. No picture is needed, only prompts.
# The teacher here is the small bundled one, so that something happens in seconds; the rest of the chapter takes a
# Stable Diffusion.
#
# ## A Stable Diffusion in miniature
#
# A real one has 860 million weights. This notebook makes one with the *same classes* and few weights, all random: its
# pictures are noise, but each line of code meets what it would meet in a real one.

# %%
import tempfile
from pathlib import Path

import diffusers
import transformers

transformers.logging.set_verbosity_error()  # no word on packages that are not needed here
room = Path(tempfile.mkdtemp())
torch.manual_seed(0)  # transformers and diffusers draw first weights from the global generator
blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1}
blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64)}
unet = diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=64, attention_head_dim=4, **blocks)
vae_blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
vae = diffusers.AutoencoderKL(block_out_channels=(32,) * 4, latent_channels=4, sample_size=64, **vae_blocks)
letters = [*"abcdefghijklmnopqrstuvwxyz,"]
words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=32)
text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ends = {"max_position_embeddings": 32, "bos_token_id": 54, "eos_token_id": 55, "pad_token_id": 55}
encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=len(words), **text, **ends))
betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **betas)
parts = {"unet": unet, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}
none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
diffusers.StableDiffusionPipeline(**parts, **none).save_pretrained(room / "tiny-sd")
print(sorted(p.name for p in (room / "tiny-sd").iterdir()))

# %% [markdown]
# ## Open it
#
# `distill.load` reads such a folder; everything it must know stands in the folder's own configuration. You could also
# give the name of a model on the Hugging Face hub.

# %%
teacher = distill.load(room / "tiny-sd")
for name in ("family", "prediction", "t_in", "steps"):
    print(f"{name:12s}", getattr(teacher.meta, name))
print(f"{'weights':12s} {sum(p.numel() for p in teacher.net.parameters()) / 1e6:.2f} million in the net")

# %% [markdown]
# It predicts noise (`eps`), like most Stable Diffusions. Remember from chapter 1: at the noisiest time an error of such a
# net is multiplied by more than 14 on its way to the picture. So learning rates must be small, about $10^{-6}$ for full
# weights, where a net that predicts the picture takes several times $10^{-4}$.

# %%
from distill.denoiser import coefficients
from distill.schedule import from_spec

t_in = torch.tensor([teacher.time()])
gain = float(coefficients(teacher.meta.prediction, from_spec(teacher.meta.schedule), t_in, torch.zeros(1, 1))[1].abs())
print(f"an error of the net, times {gain:.1f}, is the error of the picture")
assert gain > 14

# %% [markdown]
# ## Train
#
# The coach is the teacher with *adapters*: beside each layer's table of weights $W$ stand two thin ones, $B$ and $A$, and
# the layer computes $W x + B A x$. Only they are trained (LoRA, low-rank adaptation). At the start $B = 0$: the coach is
# the teacher. The student may have adapters, too, as here. Then one set of large weights serves all three; that is what
# makes it fit.


# %%
from distill.student import StudentOptions


def begin(lr):
    options = distill.VSDOptions(coach="lora", rank=8, guidance=2.0, guide="both", lr=lr, coach_lr=1e-3)
    batches = distill.prompt_batches(teacher, ["a cat", "a dog", "a red house, at night", "the sea"], batch_size=4)
    training = distill.TrainOptions(steps=widgets.size(40, 8), ema=0.95, max_spread=100)  # 10 is for nets that learned
    form = StudentOptions(student="lora", student_rank=8)
    return distill.train_student(teacher, options, batches, training, room / f"run-{next(counter)}", student=form)


from itertools import count

counter = count()
own = widgets.dashboard(
    begin, None, ["coach_ratio", "coach_loss", "x_std"], "A tiny Stable Diffusion", lr=[1e-5, 1e-6, 1e-3]
)

# %%
last = await own.finished()
print("in the run's folder:", sorted(p.name for p in (room / "run-0").iterdir()))
assert (room / "run-0/log.csv").is_file()
ratio = own.history["coach_ratio"]
print(f"coach_ratio: first {ratio[0]:.3f}, lowest {min(ratio):.3f}")
assert abs(ratio[0] - 1) < 1e-3 and min(ratio) < 1

# %% [markdown]
# Stop it and call `train_student(..., resume=True)` with the same folder: it goes on where it was. `distill train` is
# this cell as a command.
#
# ## What to watch
#
# - `coach_ratio` below 1: the coach knows the student better than the teacher does. At 1 it sleeps.
# - `coach_loss` falls, then stays. If it climbs, the student runs away.
# - `x_std`, `x_mean`: level. If they sway, the coach is too slow ([chapter 6](06_keeping_it_stable.ipynb)).
# - **not** `student_loss`. Its value says nothing.
# - pictures, at the same noise, every few hundred steps. A real student looks right after some thousands of steps.
#
# ## What it costs
#
# Training with Adam keeps, for each trained weight, a gradient and two averages beside the weight itself; and there is
# the moving average of the student. Predict:

# %%
question = widgets.predict(
    "Memory for a LoRA coach (rank 64), next to a full copy?", ["about half", "a third", "under a fifth"]
)

# %%
from accelerate import init_empty_weights

with init_empty_weights():  # no memory is taken: only shapes
    sd = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)  # Stable Diffusion 1.5's
full = sum(p.numel() for p in sd.parameters())
layers = [m for m in sd.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
lora = sum(64 * (m.weight[0].numel() + m.weight.shape[0]) for m in layers)
few = sum(64 * sum(m.weight.shape) for n, m in sd.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0")))
GB = 1e9 / 4  # weights of four bytes in a gigabyte
rows = {"teacher, frozen": full / GB, "student, trained, with its average": 5 * full / GB}
rows["student, LoRA of rank 256 everywhere"] = 5 * 4 * lora / GB
rows |= {
    "coach, a copy": 4 * full / GB,
    "coach, LoRA everywhere": 4 * lora / GB,
    "coach, LoRA on attention": 4 * few / GB,
}
print(
    f"{full / 1e6:.0f} million weights; adapters of rank 64: {lora / 1e6:.0f} everywhere, {few / 1e6:.0f} on attention"
)
for what, gigabytes in rows.items():
    print(f"{what:36s} {gigabytes:5.1f} GB")
share = lora / full
question.check("under a fifth" if share < 0.2 else "a third" if share < 0.4 else "about half")
assert abs(full / 1e6 - 860) < 1

# %% [markdown]
# In 32 bits, without the pictures' own memory. Cures when it does not fit, in this order: a LoRA coach; a LoRA student; a
# small batch, with `accumulate` of them before each update; `precision="bf16"`, nets in 16 bits; gradient checkpointing
# (chapter 11); no moving average (`ema=None`). Start with adapters on all layers: a coach that can change attention
# alone may not be able to follow its student, and `coach_loss` climbs.
#
# ## Take it away
#
# Add the adapters to the weights, and there are two forms of the same student: OneStep's own file, which knows how it must
# be called, and a folder for `diffusers`. Both must give the latent that the trained net gives. (`distill export` writes
# these and more, small LoRA files among them.)

# %%
from distill import adapters

net = adapters.merged(teacher.net, adapters.of(last.ema))
file = teacher.save_student(room / "student.safetensors", net, method="vsd", dtype=torch.float32)
again = distill.load(file)
z = torch.randn(teacher.shape(1), generator=torch.Generator().manual_seed(1))
cond = teacher.encode(["a cat"])
with torch.no_grad():
    here = distill.one_step(teacher.wrap(last.ema), teacher.time())(z, cond)  # adapters beside the weights
    there = again.latents(z, again.encode(["a cat"]))
print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, steps {again.meta.steps}, guidance baked in")
print(f"the latent from the file differs by {(here - there).abs().max():.1e} of {here.abs().max():.1f}")
assert again.meta.steps == 1 and (here - there).abs().max() < 1e-3 * here.abs().max()

# %%
folder = again.save_folder(room / "for-diffusers", again.net)
pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
with torch.no_grad():
    said = pipe.unet(z, 999, cond["encoder_hidden_states"]).sample  # one call, by hand, of diffusers' own net
    alpha, sigma = pipe.scheduler.alphas_cumprod[999].sqrt(), (1 - pipe.scheduler.alphas_cumprod[999]).sqrt()
    by_diffusers = (z - sigma * said) / alpha
print(f"through diffusers it differs by {(by_diffusers - here).abs().max():.1e}")
assert (by_diffusers - here).abs().max() < 1e-3 * here.abs().max()

# %% [markdown]
# ## The same on a real one
#
# With a GPU and a Stable Diffusion 1.5 at hand, set `ONESTEP_TEACHER` to its folder (or its name on the hub) before you
# start Jupyter. The cell is the one above with other numbers. Expect 16 GB of GPU memory or more, and first good pictures
# after hours, not minutes: published students of this kind took days of an A100.

# %%
import os

name = os.environ.get("ONESTEP_TEACHER")
if name and torch.cuda.is_available():
    big = distill.load(name, "cuda")
    captions = ["a photo of a cat", "a castle on a hill, oil painting", "a bowl of fruit", "portrait of an old man"]
    options = distill.VSDOptions(coach="lora", rank=64, guidance=4.5, guide="both", lr=1e-6, coach_lr=1e-3)
    training = distill.TrainOptions(steps=200, accumulate=4, precision="bf16", ema=None)
    batches = distill.prompt_batches(big, captions, batch_size=4)
    real = widgets.dashboard(lambda: distill.train_student(big, options, batches, training), None, readouts, name)
else:
    print("no GPU, or ONESTEP_TEACHER is not set: skipped")

# %% [markdown]
# ## Exercises
#
# **1.** In *A tiny Stable Diffusion* choose a rate of 0.001. Which readout warns first, and what does the loop say?
#
# <details><summary>Solution</summary>
#
# `x_std` moves most, since what the net says is multiplied by 14.6, and the coach cannot follow. If it passes
# `max_spread` the loop stops with the step, the readout and the likeliest cure.
# </details>
#
# **2.** Why `guide="both"` for this teacher, when the bundled student was trained with the teacher alone guided?
#
# <details><summary>Solution</summary>
#
# Stable Diffusion is usually guided by 4.5 to 7.5. On the teacher alone that would take most of the spread (chapter 6);
# on both, the student keeps it. SwiftBrush does so.
# </details>

# %% [markdown]
# ## References
#
# - Nguyen and Tran, *SwiftBrush* (2023), this recipe: [arXiv 2312.05239](https://arxiv.org/abs/2312.05239).
# - Dao and others, *SwiftBrush v2* (2024): [arXiv 2408.14176](https://arxiv.org/abs/2408.14176).
# - Hu and others, *LoRA* (2021): [arXiv 2106.09685](https://arxiv.org/abs/2106.09685).
# - Rombach and others, *Latent diffusion* (2021): [arXiv 2112.10752](https://arxiv.org/abs/2112.10752).
#
# **Next:** [chapter 10](10_four_bits.ipynb) makes the student small. Longer runs, resuming, several processes:
# [docs/researcher.md](../docs/researcher.md).
