"""Prompts in the API's format that the tests send."""

from server import node

PROMPT = "a small red ring on a blue background, top left"
SEED = 7
FOUR_BITS = "four-bits.safetensors"


def load(file: str, prompt: str = PROMPT) -> dict:
    return {
        "load": node("OneStepLoadStudent", file=file),
        "positive": node("CLIPTextEncode", clip=["load", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
    }


def save(latent: str = "sample", slot: int = 0) -> dict:
    return {"save": node("SaveLatent", samples=[latent, slot], filename_prefix="latents/test")}


def one_step(file: str, model=("load", 0), seed: int = SEED, steps: int = 0) -> dict:
    inputs = {"model": list(model), "positive": ["positive", 0], "latent": ["empty", 0], "seed": seed, "steps": steps}
    return load(file) | {"sample": node("OneStepSample", **inputs)} | save()


def scheduled(file: str, guider: dict, seed: int = SEED) -> dict:
    """Stock SamplerCustomAdvanced with our sampler and sigmas."""
    return (
        load(file)
        | save()
        | {
            "schedule": node("OneStepSchedule", model=["load", 0]),
            "noise": node("RandomNoise", noise_seed=seed),
            "guider": guider,
            "sample": node(
                "SamplerCustomAdvanced",
                noise=["noise", 0],
                guider=["guider", 0],
                sampler=["schedule", 0],
                sigmas=["schedule", 1],
                latent_image=["empty", 0],
            ),
        }
    )


def ksampler(file: str, steps: int, cfg: float) -> dict:
    inputs = {"model": ["load", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    inputs |= {"latent_image": ["empty", 0], "seed": SEED, "steps": steps, "cfg": cfg, "denoise": 1.0}
    return one_step(file) | {"sample": node("KSampler", sampler_name="euler", scheduler="simple", **inputs)}


def quantize(file: str, **more) -> dict:
    inputs = {"file": file, "name": "", "method": "auto", "bits": "4", "text_encoder": True, "prompts": "a red ring"}
    return {"quantize": node("OneStepQuantize", **inputs | more)}


def load_4bit(file, activations: str = "float") -> dict:
    return {"four": node("OneStepLoad4Bit", file=file, activations=activations)}
