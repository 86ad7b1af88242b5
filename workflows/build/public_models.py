"""The workflows of public models, each described once."""

from __future__ import annotations

from draw import Described
from pieces import advanced, box, decode, empty, needs, sample, save, split, text

HUB = "https://huggingface.co"
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


GRAPHS: dict[str, Described] = {}

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
