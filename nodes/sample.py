"""Sampling as the file's recipe says: OneStepSample does it, OneStepSchedule hands it to stock sampler nodes."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from .recipe import FewStepSampler, recipe, sigmas

CATEGORY = "OneStep"


class OneStepSample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepSample",
            display_name="OneStep Sample",
            category=CATEGORY,
            description="Makes a latent image in one step: calls a one-step student once, at the timestep it was "
            "trained for, with noise of the right strength. There is nothing to tune but the seed.",
            search_aliases=["one step sampler", "1 step", "single step", "turbo", "student", "distilled", "KSampler"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A model from OneStep Load Student. LoRA and other patches may follow."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the image shows, encoded with the CLIP of the same loader. There is no negative "
                    "prompt: the student learned guidance from its teacher.",
                ),
                io.Latent.Input(
                    "latent", tooltip="An empty latent of the size the model was trained for; it sets the batch size."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise; each seed is another image. The same seed gives KSampler's noise.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The image as a latent: decode it with the VAE.")],
        )

    @classmethod
    def execute(cls, model, positive, latent, seed) -> io.NodeOutput:
        schedule = sigmas(recipe(model), steps=1)
        image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))
        generator = torch.Generator().manual_seed(seed)  # KSampler's numbers, without touching the global generator
        noise = comfy.sample.prepare_noise_inner(image, generator, latent.get("batch_index"))
        guider = comfy.samplers.CFGGuider(model)
        conds = {"positive": positive}
        if model.model_options.get("disable_cfg1_optimization"):  # a patch that compares with a second prediction
            conds["negative"] = positive  # the student has no unguided one; Self-Attention Guidance blurs this instead
        guider.inner_set_conds(conds)
        guider.set_cfg(1.0)
        samples = guider.sample(
            noise,
            image,
            FewStepSampler(),
            schedule,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, steps=1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        samples = samples.to(comfy.model_management.intermediate_device())
        kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
        return io.NodeOutput(kept | {"samples": samples})


class OneStepSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepSchedule",
            display_name="OneStep Schedule",
            category=CATEGORY,
            description="The sampler and the sigmas that a OneStep file asks for, for SamplerCustomAdvanced: one step "
            "at the right timestep for a student, the recommended number of steps for a teacher.",
            search_aliases=["one step scheduler", "sigmas", "timestep", "student", "distilled", "BasicScheduler"],
            inputs=[
                io.Model.Input("model", tooltip="A model from OneStep Load Student. LoRA and other patches may follow.")
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="For a student, one that gives it noise of the right strength; for a teacher, Euler.",
                ),
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="The noise levels to call the model at, from the file's metadata.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        meta = recipe(model)
        sampler = comfy.samplers.sampler_object("euler") if meta.method == "teacher" else FewStepSampler()
        return io.NodeOutput(sampler, sigmas(meta, meta.steps))
