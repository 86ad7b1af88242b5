"""The workflows beside the three that are drawn by hand, each described once; tests/comfyui/refresh.py draws them."""

from __future__ import annotations

from typing import Any

from draw import Box, Described

HUB = "https://huggingface.co"
WORLD = "a large yellow star on a blue background, in the center"
PHOTO = "a red fox in fresh snow at the edge of a birch wood, morning light, photograph"


def file(directory: str, repository: str, path: str) -> dict[str, str]:
    """A file on Hugging Face, as ComfyUI's dialog of missing models takes it."""
    return {"name": path.split("/")[-1], "url": f"{HUB}/{repository}/resolve/main/{path}", "directory": directory}


SD_TURBO = file("checkpoints", "stabilityai/sd-turbo", "sd_turbo.safetensors")
SDXL = file("checkpoints", "stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors")
LIGHTNING = file("loras", "ByteDance/SDXL-Lightning", "sdxl_lightning_4step_lora.safetensors")
DMD2 = file("diffusion_models", "tianweiy/DMD2", "dmd2_sdxl_1step_unet_fp16.bin")
SCHNELL = file("diffusion_models", "city96/FLUX.1-schnell-gguf", "flux1-schnell-Q4_K_S.gguf")
CLIP_L = file("text_encoders", "comfyanonymous/flux_text_encoders", "clip_l.safetensors")
T5 = file("text_encoders", "comfyanonymous/flux_text_encoders", "t5xxl_fp8_e4m3fn.safetensors")
FLUX_VAE = file("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/ae.safetensors")


# ------------------------------------------------------------------------------------------------------------ pieces


def box(kind: str, title: str | None = None, **inputs: Any) -> Box:
    return Box(kind, inputs, title)


def student(file: str = "bundled: student", title: str | None = None) -> Box:
    return box("OneStepLoadStudent", title, file=file)


def text(clip: tuple[str, int], words: str, title: str = "Prompt") -> Box:
    return Box("CLIPTextEncode", {"clip": clip, "text": words}, title, prompt=True)


def empty(side: int = 64, count: int = 4) -> Box:
    return box("EmptyLatentImage", width=side, height=side, batch_size=count)


def seed(title: str = "Seed, for both") -> Box:
    return box("PrimitiveInt", title, value=1)


def sample(model: str, positive: str, latent: str = "empty", seed: Any = 1, title: str | None = None) -> Box:
    inputs = {"model": (model, 0), "positive": (positive, 0), "latent": (latent, 0), "seed": seed}
    return Box("OneStepSample", inputs, title)


def decode(latent: str, vae: tuple[str, int]) -> Box:
    return box("VAEDecode", samples=(latent, 0), vae=vae)


def larger(image: str) -> Box:
    return box("ImageScaleBy", image=(image, 0), upscale_method="nearest-exact", scale_by=4)


def save(images: tuple[str, int], title: str, prefix: str, height: int = 300) -> Box:
    return Box("SaveImage", {"images": images, "filename_prefix": f"OneStep/{prefix}"}, title, height)


def show(source: tuple[str, int], title: str, height: int = 140) -> Box:
    return Box("PreviewAny", {"source": source}, title, height)


def needs(kind: str, models: list[dict[str, str]], **inputs: Any) -> Box:
    """A loader, and the files it wants."""
    return Box(kind, inputs, models=models)


def advanced(model: tuple[str, int], positive: str, latent: str) -> dict[str, Box]:
    """OneStepRecipe and what turns its outputs into a latent, "sampled"."""
    return {
        "recipe": box("OneStepRecipe", model=model),
        "noise": box("RandomNoise", noise_seed=1),
        "guider": box("BasicGuider", model=("recipe", 0), conditioning=(positive, 0)),
        "sampled": box(
            "SamplerCustomAdvanced", noise=("noise", 0), guider=("guider", 0), sampler=("recipe", 1),
            sigmas=("recipe", 2), latent_image=(latent, 0),
        ),
    }  # fmt: skip


def split(boxes: dict[str, Box], *columns: int) -> list[dict[str, Box]]:
    """Boxes in columns of so many."""
    items, out = list(boxes.items()), []
    for count in columns:
        out.append(dict(items[:count]))
        items = items[count:]
    return out


# -------------------------------------------------------------------------------------------------- nothing to download

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

# ------------------------------------------------------------------------------------------------------- public models

GRAPHS["sd-turbo"] = Described(
    "SD-Turbo in one step",
    f"""
A public one-step model, called right: **OneStep Sample** knows SD-Turbo by its file's name (the node says so), and with
it the timestep and the strength of the noise.

**Needs** [sd_turbo.safetensors]({SD_TURBO["url"]}) in *models/checkpoints* (5 GB). Mind its licence.

**Try**
- *steps* 2 to 4;
- **OneStep Negative** behind the loader;
- **OneStep Quantize** and **OneStep Load 4-bit** in place of the checkpoint's MODEL.

Made for 512 x 512 pixels.
""",
    [
        {"load": needs("CheckpointLoaderSimple", [SD_TURBO], ckpt_name=SD_TURBO["name"]), "empty": empty(512, 1)},
        {"positive": text(("load", 1), PHOTO)},
        {"sample": sample("load", "positive")},
        {"decode": decode("sample", ("load", 2)), "save": save(("decode", 0), "SD-Turbo, 1 step", "sd-turbo", 460)},
    ],
    [300, 280, 260, 460],
)

GRAPHS["sdxl-dmd2-one-step"] = Described(
    "SDXL in one step: DMD2",
    f"""
DMD2's one-step SDXL is called at timestep 399. Stock samplers give noise that is too weak there, and grey pictures;
**OneStep Sample** gives it right.

**Needs**
- [dmd2_sdxl_1step_unet_fp16.bin]({DMD2["url"]}) in *models/diffusion_models* (5 GB);
- [sd_xl_base_1.0.safetensors]({SDXL["url"]}) in *models/checkpoints*, for its CLIP and VAE (7 GB).

**Try** DMD2's 4-step LoRA on the checkpoint instead: better hands, four calls.

Made for 1024 x 1024 pixels.
""",
    [
        {
            "unet": needs("UNETLoader", [DMD2], unet_name=DMD2["name"], weight_dtype="default"),
            "load": needs("CheckpointLoaderSimple", [SDXL], ckpt_name=SDXL["name"]),
            "empty": empty(1024, 1),
        },
        {"positive": text(("load", 1), PHOTO)},
        {"sample": sample("unet", "positive")},
        {"decode": decode("sample", ("load", 2)), "save": save(("decode", 0), "DMD2, 1 step", "dmd2", 460)},
    ],
    [320, 280, 260, 460],
)

GRAPHS["sdxl-lightning-lora"] = Described(
    "SDXL-Lightning, as a LoRA",
    f"""
**OneStep Recipe** knows the LoRA by its name and hands its timesteps and sampler to ComfyUI's own
**SamplerCustomAdvanced**. Put another LoRA in its place (Hyper-SD, DMD2, LCM, TCD): the recipe follows.

**Needs**
- [sd_xl_base_1.0.safetensors]({SDXL["url"]}) in *models/checkpoints* (7 GB);
- [sdxl_lightning_4step_lora.safetensors]({LIGHTNING["url"]}) in *models/loras* (400 MB).

**Try** the 2-step and 8-step files: the number in the name sets the steps.

Made for 1024 x 1024 pixels.
""",
    split(
        {
            "load": needs("CheckpointLoaderSimple", [SDXL], ckpt_name=SDXL["name"]),
            "lora": needs(
                "LoraLoaderModelOnly", [LIGHTNING], model=("load", 0), lora_name=LIGHTNING["name"], strength_model=1.0
            ),
            "positive": text(("load", 1), PHOTO),
            "empty": empty(1024, 1),
            **advanced(("lora", 0), "positive", "empty"),
            "decode": decode("sampled", ("load", 2)),
            "save": save(("decode", 0), "SDXL-Lightning, 4 steps", "lightning", 460),
        },
        3, 4, 1, 2,
    ),
    [330, 290, 260, 420],
)  # fmt: skip

GRAPHS["flux-schnell-four-bit"] = Described(
    "FLUX.1 schnell in four bits",
    f"""
**OneStep Load 4-bit** opens GGUF, nunchaku and OneStep files; the weights stay packed. **OneStep Recipe** knows
schnell: four steps, no guidance.

**Needs**
- [flux1-schnell-Q4_K_S.gguf]({SCHNELL["url"]}) in *models/diffusion_models* (7 GB);
- [clip_l]({CLIP_L["url"]}) and [t5xxl_fp8_e4m3fn]({T5["url"]}) in *models/text_encoders* (5 GB);
- [ae.safetensors]({FLUX_VAE["url"]}) in *models/vae*.

**Try** *steps* 1 in **OneStep Recipe**; **OneStep Quantize** on the full file.
""",
    split(
        {
            "load": box("OneStepLoad4Bit", file=SCHNELL["name"]),
            "clip": needs(
                "DualCLIPLoader", [CLIP_L, T5], clip_name1=CLIP_L["name"], clip_name2=T5["name"], type="flux"
            ),
            "vae": needs("VAELoader", [FLUX_VAE], vae_name=FLUX_VAE["name"]),
            "empty": box("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
            "positive": text(("clip", 0), PHOTO),
            **advanced(("load", 0), "positive", "empty"),
            "decode": decode("sampled", ("vae", 0)),
            "save": save(("decode", 0), "FLUX.1 schnell, 4 steps", "schnell", 460),
        },
        4, 4, 1, 2,
    ),
    [330, 290, 260, 420],
)  # fmt: skip

GRAPHS["four-bit-sdxl-with-lora"] = Described(
    "Four bits and a LoRA",
    f"""
SDXL in four bits, about 1.4 GB of weights, with a LoRA that makes it a four-step model. The LoRA runs beside the packed
layers, so it is exact, and the weights stay packed.

**Needs**
- [sd_xl_base_1.0.safetensors]({SDXL["url"]}) in *models/checkpoints* (7 GB), also for its CLIP and VAE;
- [sdxl_lightning_4step_lora.safetensors]({LIGHTNING["url"]}) in *models/loras* (400 MB).

**OneStep Quantize** takes a minute or two, once. Then choose the file in **OneStep Load 4-bit** (press *R*).

**Try** any other SDXL LoRA behind the first: a style, a character.
""",
    split(
        {
            "base": needs("CheckpointLoaderSimple", [SDXL], ckpt_name=SDXL["name"]),
            "quantize": box("OneStepQuantize", "OneStep Quantize: once", file=SDXL["name"]),
            "load": box("OneStepLoad4Bit", file=("quantize", 0)),
            "lora": needs(
                "LoraLoaderModelOnly", [LIGHTNING], model=("load", 0), lora_name=LIGHTNING["name"], strength_model=1.0
            ),
            "positive": text(("base", 1), PHOTO),
            "empty": empty(1024, 1),
            **advanced(("lora", 0), "positive", "empty"),
            "decode": decode("sampled", ("base", 2)),
            "save": save(("decode", 0), "SDXL, 4-bit, 4 steps", "four-bit-lora", 420),
        },
        2, 4, 3, 1, 2,
    ),
    [290, 270, 250, 230, 300],
)  # fmt: skip
