"""Sampling as a recipe says: OneStepSample does it, OneStepRecipe and OneStepSchedule prepare stock samplers."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io, ui

from .families import AUTO, CHOSEN, HIDDEN, family_input, prepare, say, seed_input, steps_input
from .recipe import KEY, recipe

CATEGORY = "OneStep"


class OneStepSample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepSample",
            display_name="OneStep Sample",
            category=CATEGORY,
            description="Makes a latent image in one step, or the few its model takes: calls a student, or a public "
            "few-step model, at the timesteps it was trained for, with noise of the right strength. Nothing is to be "
            "tuned but the seed.",
            search_aliases=[
                "one step sampler",
                "1 step",
                "single step",
                "few step",
                "turbo",
                "student",
                "distilled",
                "KSampler",
                "lightning",
                "DMD2",
                "hyper-sd",
                "LCM",
                "TCD",
                "schnell",
            ],  # fmt: skip
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model from OneStep Load Student, or a public few-step model from any loader, through "
                    "LoRA and other patches.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the image shows, encoded with the CLIP of the same loader. There is no negative "
                    "prompt: such a model learned guidance from its teacher.",
                ),
                io.Latent.Input(
                    "latent", tooltip="An empty latent of the size the model was trained for; it sets the batch size."
                ),
                seed_input("Seed of the noise; each seed is another image. The same seed gives KSampler's noise."),
                family_input(),
                steps_input(
                    "what a OneStep student was made for, one for its teacher, what their makers say for others"
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The image as a latent: decode it with the VAE.")],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(cls, model, positive, latent, seed, family=AUTO, steps=0) -> io.NodeOutput:
        ready = prepare(model, family, steps, cls.hidden, least=True)
        if ready.recipe.guidance != 1 and (ready.recipe.name != "onestep" or model.get_attachment(KEY) is None):
            raise ValueError(
                f"{ready.recipe.title} wants guidance (CFG {ready.recipe.guidance:g}), which this node has not. Use "
                "OneStep Recipe with CFGGuider and SamplerCustomAdvanced."
            )
        say(ready.said, cls.hidden)
        model, schedule = ready.model, ready.sigmas
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
            ready.sampler,
            schedule,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(schedule) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        samples = samples.to(comfy.model_management.intermediate_device())
        kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
        return io.NodeOutput(kept | {"samples": samples})


class OneStepRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepRecipe",
            display_name="OneStep Recipe",
            category=CATEGORY,
            description="Calls a few-step model the way it was trained: knows the timesteps, the prediction, the noise "
            "and the sampler of SD-Turbo, SDXL-Lightning, Hyper-SD, DMD2, LCM, TCD, FLUX schnell and others, and of "
            "OneStep files, and hands them to SamplerCustomAdvanced.",
            search_aliases=[
                "few step sampler",
                "turbo",
                "lightning",
                "DMD2",
                "hyper-sd",
                "LCM",
                "LCM LoRA",
                "TCD",
                "swiftbrush",
                "instaflow",
                "schnell",
                "sd3.5 turbo",
                "pixart",
                "distilled",
                "ModelSamplingDiscrete",
                "SDTurboScheduler",
                "BasicScheduler",
            ],  # fmt: skip
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A few-step model from any loader, with its LoRA and any other patch before this node.",
                ),
                family_input(),
                steps_input("what the file's name says, or else its makers"),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The same model, knowing what its net puts out. For the guider."
                ),
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="The family's own sampler, which gives the model noise of the right strength.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels of the timesteps it is called at."),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(cls, model, family=AUTO, steps=0) -> io.NodeOutput:
        ready = prepare(model, family, steps, cls.hidden)
        say(ready.said, cls.hidden)
        told = ready.model.clone()
        told.set_attachments(CHOSEN, (ready.recipe, len(ready.sigmas) - 1))
        return io.NodeOutput(told, ready.sampler, ready.sigmas, ui=ui.PreviewText(ready.said))


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
        recipe(model)  # a file's, or it says what to do
        ready = prepare(model)
        return io.NodeOutput(ready.sampler, ready.sigmas)
