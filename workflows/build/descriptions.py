"""The workflows beside the three that are drawn by hand, each described once; tests/comfyui/refresh.py draws them. Here
those with nothing to download, and then those of public models."""

from __future__ import annotations

import public_models
from draw import Described
from pieces import WORLD, box, decode, empty, larger, sample, save, seed, show, student, text

GRAPHS: dict[str, Described] = {}

GRAPHS["negative-prompt-in-one-step"] = Described(
    "A negative prompt in one step",
    """
Above, without; below, with a **negative prompt**, from the same noise. A one-step student has no CFG, so its negative
prompt is subtracted inside the network, without a second call of it.

**Look at** what the prompt leaves open, here the colour and the shape: what is negated becomes rare, the rest stays.

**Try**
- the name of a colour or shape that you see above as *negative prompt*;
- *strength*, in cross-attention, and *pooled*, of the prompt as a whole: 0 switches each off. Too much spoils the
picture;
- any other U-Net: for SD 1.5 and SD-Turbo *strength* alone.

Nothing to download.
""",
    [
        {"load": student(), "empty": empty(), "seed": seed()},
        {
            "positive": text(("load", 1), "a shape on a blue background"),
            "unwanted": text(("load", 1), "a red shape", "Negative prompt"),
            "negative": box(
                "OneStepNegative", model=("load", 0), negative=("unwanted", 0), strength=0.3, pooled=2.0
            ),
        },
        {
            "without": sample("load", "positive", seed=("seed", 0), title="Without"),
            "with": sample("negative", "positive", seed=("seed", 0), title="With the negative prompt"),
        },
        {
            "decode a": decode("without", ("load", 2)), "scale a": larger("decode a"),
            "decode b": decode("with", ("load", 2)), "scale b": larger("decode b"),
        },
        {
            "save a": save(("scale a", 0), "Without", "negative-without"),
            "save b": save(("scale b", 0), "With the negative prompt", "negative-with"),
        },
    ],
    [240, 260, 250, 240, 260],
)  # fmt: skip

GRAPHS["compare-models"] = Described(
    "Teacher, student, four bits: side by side",
    """
**OneStep Compare** draws the same prompts from the same noise with up to four models, each called as its file says.
Here: the teacher in all its steps, its one-step student, and the student in four bits.

**Look at**
- the time under each column, with the shortest and the longest behind it;
- the memory of the weights, and the size of the file.

**Try**
- your own student or model as *model_4*;
- other *prompts*, one a line.

Nothing to download. The 4-bit file is *models/diffusion_models/student-4bit.safetensors*.
""",
    [
        {
            "teacher": student("bundled: teacher", "Load the teacher"),
            "student": student(title="Load the student"),
            "quantize": box("OneStepQuantize", "OneStep Quantize: once", file="bundled: student"),
        },
        {
            "four": box("OneStepLoad4Bit", file=("quantize", 0)),
            "empty": empty(count=1),
            "compare": box(
                "OneStepCompare", model_1=("teacher", 0), model_2=("student", 0), model_3=("four", 0),
                clip=("student", 1), vae=("student", 2), latent=("empty", 0), seed=1,
                names="teacher\nstudent\nstudent, 4-bit",
            ),
        },
        {
            "save": save(("compare", 0), "Side by side", "compare", 560),
            "report": show(("compare", 1), "As text"),
        },
    ],
    [280, 300, 520],
)  # fmt: skip

GRAPHS["quantize-your-model"] = Described(
    "Quantize a model, and use it",
    """
**OneStep Quantize** writes a 4-bit file of a model, convolutions included; **OneStep Load 4-bit** opens it. The weights
stay packed in memory.

**Try**
- your own model as *file*: SD 1.5, SDXL, Flux and others. Then connect that model's own CLIP and VAE, and sample with
**KSampler**, or with **OneStep Sample** if it is a few-step model;
- *bits* 3 or 8; *method* rtn against auto;
- *text_encoder*, to round that, too.

The report tells size and error. Once the file is there, choose it in **OneStep Load 4-bit** (press *R*) and delete
**OneStep Quantize** here.

Nothing to download. The file is *models/diffusion_models/student-4bit.safetensors*.
""",
    [
        {"quantize": box("OneStepQuantize", file="bundled: student"), "report": show(("quantize", 1), "Report", 180)},
        {
            "load": box("OneStepLoad4Bit", file=("quantize", 0)),
            "positive": text(("load", 1), WORLD),
            "empty": empty(),
        },
        {"sample": sample("load", "positive")},
        {"decode": decode("sample", ("load", 2)), "scale": larger("decode")},
        {"save": save(("scale", 0), "4-bit", "quantized", 460)},
    ],
    [300, 250, 240, 240, 280],
)

GRAPHS["four-bit-and-lora"] = Described(
    "A LoRA on four bits, trained here",
    """
A LoRA that was trained on a **dense teacher** works on its **4-bit student**: it runs beside the packed layers, so it
is exact, and nothing is rounded again.

ComfyUI's own **Train LoRA** teaches the teacher, in 80 steps, that *a shape* is what some pictures show. Above, the
student without that LoRA; below, with it, from the same noise.

**Try**
- *strength_model* 0.5, or -1;
- another prompt for *What the LoRA learns*, and another word for it;
- **Save LoRA Weights** behind **Train LoRA**: a file for **Load LoRA**.

Nothing to download. Half a minute on two CPU cores, once.
""",
    [
        {
            "teacher": student("bundled: teacher", "Load the teacher"),
            "quantize": box("OneStepQuantize", "OneStep Quantize: once", file="bundled: student", method="rtn"),
            "load": box("OneStepLoad4Bit", file=("quantize", 0)),
        },
        {
            "subject": text(("load", 1), "a large green heart on a pink background, in the center",
                            "What the LoRA learns"),
            "word": text(("load", 1), "a shape", "Its word"),
            "empty": empty(),
            "pictures": sample("load", "subject", seed=5, title="Pictures to learn from"),
        },
        {
            "train": box(
                "TrainLoraNode", model=("teacher", 0), latents=("pictures", 0), positive=("word", 0), batch_size=4,
                steps=80, learning_rate=0.002, training_dtype="fp32", lora_dtype="fp32", gradient_checkpointing=False,
                existing_lora="[None]",
            ),
            "lora": box("LoraModelLoader", model=("load", 0), lora=("train", 0)),
        },
        {
            "without": sample("load", "word", title="Without"),
            "with": sample("lora", "word", title="With the LoRA"),
        },
        {
            "decode a": decode("without", ("load", 2)), "scale a": larger("decode a"),
            "save a": save(("scale a", 0), "Without", "lora-without", 190),
            "decode b": decode("with", ("load", 2)), "scale b": larger("decode b"),
            "save b": save(("scale b", 0), "With the LoRA", "lora-with", 190),
        },
    ],
    [250, 240, 260, 230, 250],
)  # fmt: skip

GRAPHS["train-a-student"] = Described(
    "Train a one-step student",
    """
Press **Run**, and watch. In five minutes, on two CPU cores, the bundled teacher of many steps becomes a student of one:
pairs of noise and picture first, then a **coach** that tells the student where its own pictures are.

The four pictures on the node are drawn anew every few seconds. **Cancel keeps the student so far** in
*models/diffusion_models*.

**Try**
- *minutes* 1, and 20;
- *training_seed*: another student;
- *folder* and *prompts*: a Stable Diffusion in diffusers' layout as teacher. That takes hours, and a GPU.

It needs *accelerate* and *diffusers* in ComfyUI's Python; where one is missing, it says so. Nothing else to download.
""",
    [
        {"train": box("OneStepTrainStudent", teacher="bundled: teacher", minutes=5.0, name="my-student")},
        {"positive": text(("train", 1), WORLD), "empty": empty(), "report": show(("train", 3), "Report")},
        {"sample": sample("train", "positive")},
        {"decode": decode("sample", ("train", 2)), "scale": larger("decode")},
        {"save": save(("scale", 0), "The new student, 1 step", "trained", 460)},
    ],
    [300, 260, 240, 240, 300],
)

GRAPHS["benchmark"] = Described(
    "How fast is it here?",
    """
**OneStep Benchmark** measures, in the manner of MLPerf Inference, how long a model takes on this machine: one picture
after the other (percentiles), and in batches (pictures a second). Text encoder, network and VAE apart.

**Look at** the brackets: between those bounds lies each percentile, with 95 % confidence. Two models whose ranges
overlap have not been told apart.

**Try**
- more *queries*: the ranges become narrower;
- **OneStep Load 4-bit** in place of the loader;
- *batch_size* in **Empty Latent Image**.

Let the machine rest meanwhile. Nothing to download.
""",
    [
        {"load": student(), "empty": empty(count=8)},
        {
            "bench": box(
                "OneStepBenchmark", model=("load", 0), clip=("load", 1), vae=("load", 2), latent=("empty", 0),
                queries=50, batches=5, seed=1,
            ),
        },
        {
            "save": save(("bench", 1), "Each picture's time", "benchmark", 420),
            "table": show(("bench", 0), "Table", 220),
            "json": show(("bench", 2), "All times, as JSON", 120),
        },
    ],
    [250, 300, 640],
)  # fmt: skip

GRAPHS["inpaint-with-a-student"] = Described(
    "Replace a part of a picture",
    """
Above, a picture. Below, the same with its **left half** drawn anew from another prompt; what the mask protects stays
as it is.

A mask on the latent works in one step, too: the student sees noise everywhere, and its answer is used where the mask
is white.

**Try**
- *x* and *width* of the masks: another part;
- the same seed in both samplers, so that the halves go together, and different ones;
- your own picture: **Load Image**, **VAE Encode** and the mask editor in place of the first sampler.

Nothing to download.
""",
    [
        {
            "load": student(),
            "first": text(
                ("load", 1), "a large yellow star on a blue background, in the center", "Prompt of the picture"
            ),
            "second": text(("load", 1), "a large red star on a blue background, in the center", "Prompt of the part"),
            "empty": empty(),
            "seed": seed(),
        },
        {
            "nothing": box("SolidMask", "Black: stays", value=0.0, width=64, height=64),
            "half": box("SolidMask", "White: anew", value=1.0, width=32, height=64),
            "mask": box(
                "MaskComposite", destination=("nothing", 0), source=("half", 0), x=0, y=0, operation="add"
            ),
        },
        {
            "sample": sample("load", "first", seed=("seed", 0), title="The picture"),
            "masked": box("SetLatentNoiseMask", samples=("sample", 0), mask=("mask", 0)),
        },
        {
            "again": sample("load", "second", "masked", ("seed", 0), "The part"),
            "decode a": decode("sample", ("load", 2)),
            "decode b": decode("again", ("load", 2)),
        },
        {
            "scale a": larger("decode a"), "save a": save(("scale a", 0), "The picture", "inpaint-before", 250),
            "scale b": larger("decode b"), "save b": save(("scale b", 0), "With another half", "inpaint-after", 250),
        },
    ],
    [240, 220, 250, 250, 260],
)  # fmt: skip

GRAPHS |= public_models.GRAPHS
