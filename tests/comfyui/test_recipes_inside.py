"""What a recipe gives in ComfyUI is what the family's own pipeline gives: the same noise, the same latent.

Tiny random nets: one U-Net as a OneStep file for all families of Stable Diffusion, and PixArt, SD3 and FLUX as
diffusers saves them, through ComfyUI's own loader. The references are diffusers' pipelines whole, or the few lines of a
family's own code where diffusers has none.
"""

import json
import subprocess
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from safetensors.torch import load_file, save_file
from server import PACK, environment

SEED = 5
LATENT = tiny.LATENT | {"channels": 4, "rgb_factors": None, "rgb_bias": None}
UNET = {"in_channels": 4, "out_channels": 4, "class_embed_type": None, "projection_class_embeddings_input_dim": None}
UNETS = {
    "unet-eps": {"prediction": "eps", "schedule": tiny.DDPM | {"shift": 1.0}, "t_in": 999},
    "unet-flow": {"prediction": "flow", "schedule": tiny.FLOW | {"shift": 1.0}, "t_in": 1000},
}
SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
    "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
PIXART = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
TRAILING = SD | {"timestep_spacing": "trailing"}


def euler(kind=EulerDiscreteScheduler, **options):
    """As the cards make it of the base model's scheduler."""
    return of(kind, timestep_spacing="trailing", **options)


def of(kind, **options):
    """A scheduler of the base model's configuration."""
    return kind(**{k: v for k, v in SD.items() if k in kind().config} | options)


# family -> (file, [(steps, scheduler, more arguments of the pipeline)])
JOBS = {
    "sd-turbo": ("unet-eps", [(n, euler(), {}) for n in (1, 3, 4)]),
    "sdxl-turbo": ("unet-eps", [(n, euler(EulerAncestralDiscreteScheduler), {}) for n in (1, 2, 4)]),
    "sdxl-lightning-1step": ("unet-eps", [(1, euler(prediction_type="sample"), {})]),
    "sdxl-lightning": ("unet-eps", [(n, euler(), {}) for n in (2, 4, 8)]),
    "hyper-sdxl-1step": ("unet-eps", [(1, of(LCMScheduler), {"timesteps": [800]})]),
    "hyper-sdxl-unified": ("unet-eps", [(n, of(TCDScheduler), {"eta": 1.0}) for n in (1, 4)]),
    "hyper-sdxl": ("unet-eps", [(n, DDIMScheduler(**TRAILING), {}) for n in (2, 4, 8)]),
    "hyper-sd15": ("unet-eps", [(4, DDIMScheduler(**TRAILING), {})]),
    "dmd2-sdxl-1step": ("unet-eps", [(1, of(LCMScheduler), {"timesteps": [399]})]),
    "dmd2-sdxl": ("unet-eps", [(4, of(LCMScheduler), {"timesteps": [999, 749, 499, 249]})]),
    "lcm-sdxl": ("unet-eps", [(n, of(LCMScheduler), {}) for n in (1, 3, 4, 8)]),
    "tcd-sdxl": ("unet-eps", [(n, of(TCDScheduler), {"eta": 0.3}) for n in (4, 7)]),
    "swiftbrush": ("unet-eps", [(1, None, {})]),
    "instaflow": ("unet-eps", [(1, None, {})]),
    "two-rectified-flow": ("unet-eps", [(5, None, {})]),
    "sana-sprint": ("unet-flow", [(n, SCMScheduler(), {}) for n in (1, 2, 4)]),
    "pixart-dmd": ("pixart", [(1, DDPMScheduler(**PIXART), {"timesteps": [400]})]),
    "pixart-lcm": ("pixart", [(2, LCMScheduler(**PIXART), {})]),
    "sd35-large-turbo": ("sd3", [(n, FlowMatchEulerDiscreteScheduler(shift=3.0), {}) for n in (1, 4)]),
    "flux-schnell": ("flux", [(n, FlowMatchEulerDiscreteScheduler(shift=1.0), {}) for n in (1, 4)]),
}  # fmt: skip
GUIDED = ("two-rectified-flow",)
CASES = [(family, i) for family, (_, runs) in JOBS.items() for i in range(len(runs))]


def name(family: str, i: int) -> str:
    return f"{family} {JOBS[family][1][i][0]}"


# ---------------------------------------------------------------------------------------------------- tiny models


def transformers() -> dict:
    """Nets of diffusers, as small as ComfyUI's detection takes them (its PixArt is 1152 wide)."""
    return {
        "pixart": diffusers.PixArtTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=1, sample_size=64,
            cross_attention_dim=1152, caption_channels=4096, use_additional_conditions=False,
        ),
        "sd3": diffusers.SD3Transformer2DModel(
            sample_size=16, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=96,
            caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=16, qk_norm="rms_norm",
        ),
        "flux": diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=96,
            pooled_projection_dim=64,
        ),
    }  # fmt: skip


def inputs(file: str) -> dict[str, torch.Tensor]:
    """The seed's noise, as KSampler draws it, and a random prompt."""
    channels, words, width, pooled = {
        "pixart": (4, 120, 4096, 0), "sd3": (16, 7, 96, 64), "flux": (16, 7, 96, 64),
    }.get(file, (4, 32, 128, 0))  # fmt: skip
    g = torch.Generator().manual_seed(1)
    tensors = {"context": torch.randn(1, words, width, generator=g)}
    tensors |= {"pooled": torch.randn(1, pooled, generator=g)} if pooled else {}
    size = (1, channels, 48, 48) if file == "pixart" else (2, channels, 8, 8)  # ComfyUI's PixArt takes none below 48
    return tensors | {"noise": torch.randn(size, generator=torch.Generator().manual_seed(SEED))}


@pytest.fixture(scope="module")
def nets():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        nets = transformers()
        for net in nets.values():
            for weight in net.parameters():  # where they start at zero nothing would be seen
                weight.data.add_(0.02 * torch.randn_like(weight))
    return {k: net.eval() for k, net in nets.items()} | dict.fromkeys(UNETS, tiny.modules(7, **UNET).unet)


@pytest.fixture(scope="module")
def latents(comfyui, nets, tmp_path_factory):
    from distill.file import checkpoint

    folder: Path = tmp_path_factory.mktemp("recipes")
    for file, options in UNETS.items():
        pipe = tiny.pipeline(tiny.Modules(nets["unet-eps"], None, None, None), latent=LATENT, **options)
        checkpoint.write(folder / file, checkpoint.pack(pipe))
    for file in ("pixart", "sd3", "flux"):
        save_file({k: v.contiguous() for k, v in nets[file].state_dict().items()}, folder / file)
    for file in (*UNETS, "pixart", "sd3", "flux"):
        save_file(inputs(file), folder / f"{file}.inputs")
    jobs = []
    for family, i in CASES:
        file, runs = JOBS[family]
        both = family not in GUIDED and file != "pixart"  # which takes its seconds
        job = {"name": name(family, i), "file": file, "family": family, "steps": runs[i][0], "seed": SEED, "both": both}
        jobs.append(job)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [comfyui[1], str(PACK / "tests/comfyui/recipes_inside.py"), str(folder)]
    done = subprocess.run(command, cwd=comfyui[0], env=environment(), capture_output=True, text=True, timeout=600)
    assert (folder / "latents.safetensors").is_file(), (done.stdout + done.stderr)[-5000:]
    return load_file(folder / "latents.safetensors")


# ----------------------------------------------------------------------------------------------------- references


def reference(nets: dict, family: str, i: int) -> torch.Tensor:
    """What the family's own pipeline makes of the same noise and prompt, with the same fresh noise."""
    file, runs = JOBS[family]
    steps, scheduler, more = runs[i]
    given = inputs(file)
    if scheduler is None:
        return OWN[family](nets[file], given, steps)
    n, *_, h, w = given["noise"].shape
    pixels = {"height": h * (32 if family == "sana-sprint" else 8), "width": w * (32 if family == "sana-sprint" else 8)}
    more = more | {"num_inference_steps": steps, "latents": given["noise"].clone(), "output_type": "latent"} | pixels
    more |= {"generator": torch.Generator().manual_seed(SEED + 1), "prompt_embeds": given["context"].expand(n, -1, -1)}
    pipe = PIPELINES.get(file, stable_diffusion)(nets[file], scheduler, given, more)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**more).images
    return pipe._unpack_latents(made, 8 * h, 8 * w, pipe.vae_scale_factor) if file == "flux" else made


def stable_diffusion(net, scheduler, given, more):
    more |= {"guidance_scale": 0.0}
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(unet=net, scheduler=scheduler, requires_safety_checker=False, **parts)


class Sana(torch.nn.Module):
    """A flow U-Net as SanaSprintPipeline calls its transformer: told the flow's time in [0, 1]."""

    def __init__(self, net):
        super().__init__()
        self.net, self.config, self.dtype, self.device = net, Config(), torch.float32, torch.device("cpu")

    def forward(self, x, encoder_hidden_states, timestep, **_):
        return (self.net(x, 1000 * timestep, encoder_hidden_states).sample,)


class Config:
    in_channels, out_channels, patch_size, sample_size, guidance_embeds_scale = 4, 4, 1, 8, 0.1


def sana(net, scheduler, given, more):
    more |= {"use_resolution_binning": False, "prompt_attention_mask": torch.ones(len(given["noise"]), 32)}
    more |= {} if more["num_inference_steps"] == 2 else {"intermediate_timesteps": None}
    return diffusers.SanaSprintPipeline(None, None, None, Sana(net), scheduler)


def pixart(net, scheduler, given, more):
    more |= {"guidance_scale": 0.0, "use_resolution_binning": False, "negative_prompt": None}
    more |= {"prompt_attention_mask": torch.ones(1, given["context"].shape[1])}
    return diffusers.PixArtAlphaPipeline(None, None, None, net, scheduler)


def sd3(net, scheduler, given, more):
    n = len(given["noise"])
    more |= {"guidance_scale": 0.0, "pooled_prompt_embeds": given["pooled"].expand(n, -1)}
    return diffusers.StableDiffusion3Pipeline(net, scheduler, *[None] * 7)


def flux(net, scheduler, given, more):
    n = len(given["noise"])
    more |= {"guidance_scale": 0.0, "pooled_prompt_embeds": given["pooled"].expand(n, -1)}
    more["latents"] = diffusers.FluxPipeline._pack_latents(more["latents"], *given["noise"].shape)
    return diffusers.FluxPipeline(scheduler, None, None, None, None, None, net)


PIPELINES = {"unet-flow": sana, "pixart": pixart, "sd3": sd3, "flux": flux}


def swiftbrush(net, given, steps):
    """infer.py of VinAIResearch/SwiftBrush, with the schedule's own alpha."""
    a = DDPMScheduler(**{k: v for k, v in SD.items() if k.startswith("beta")}).alphas_cumprod[999]
    eps = call(net, given["noise"], 999, given)
    return (given["noise"] - (1 - a).sqrt() * eps) / a.sqrt()


def rectified_flow(net, given, steps):
    """code/pipeline_rf.py of gnobitab/InstaFlow."""
    x = given["noise"]
    for i in range(steps):
        x = x + call(net, x, 1000 * (1 - i / steps), given) / steps
    return x


def call(net, x, t: float, given):
    return net(x, torch.full((len(x),), t), given["context"].expand(len(x), -1, -1)).sample


OWN = {"swiftbrush": swiftbrush, "instaflow": rectified_flow, "two-rectified-flow": rectified_flow}


@pytest.mark.parametrize(("family", "i"), CASES, ids=lambda v: v if isinstance(v, str) else "")
@torch.no_grad()
def test_the_family_s_own_pipeline_gives_the_same(latents, nets, family, i):
    expected = reference(nets, family, i)
    own = name(family, i)
    assert family in GUIDED or JOBS[family][0] == "pixart" or f"{own} sample" in latents
    for end in (end for end in ("", " sample") if own + end in latents):
        found = latents[own + end]
        assert found.shape == expected.shape and expected.std() > 0.1
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), end


@torch.no_grad()
def test_dmd2_s_own_loop_gives_the_same(latents, nets):
    """demo/text_to_image_sdxl.py of tianweiy/DMD2: x0 by the schedule, noised again to the next timestep."""
    scheduler, given, net = DDIMScheduler(**SD), inputs("unet-eps"), nets["unet-eps"]
    x, g = given["noise"], torch.Generator().manual_seed(SEED + 1)
    for t, then in ((999, 749), (749, 499), (499, 249), (249, None)):
        a = scheduler.alphas_cumprod[t]
        x0 = (x - (1 - a).sqrt() * call(net, x, t, given)) / a.sqrt()
        x = then and scheduler.add_noise(x0, torch.randn(x0.shape, generator=g), torch.tensor([then]))
    assert (latents["dmd2-sdxl 4"] - x0).abs().max() <= 1e-4 * x0.abs().max()
