"""A OneStep file, run to calibrate it."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from .. import layouts
from ..backbones.stable_diffusion import StableDiffusion, build_tokenizer, empty, fill
from ..file import checkpoint
from ..file.metadata import Metadata
from ..header import CheckpointError
from ..sample import prior_scale
from ..schedule import randn
from .options import Progress, Prompts, Quantize
from .prompts import given_prompts
from .runnable import Runnable
from .source import Source

PROBES = 32
"""pictures, or denoiser calls, that the output error is measured on: not those of calibration"""
PROBE_SEED = 8191


class OneStep(Runnable):
    """A OneStep file: a student at its one timestep, a teacher along its own trajectory."""

    @classmethod
    def open(
        cls, source: Source, options: Quantize, parts: tuple[str, ...], prompts: Prompts | None
    ) -> tuple[OneStep | None, str]:
        """The file's nets without weights, to be streamed; or None and why it cannot run."""
        meta = Metadata.from_strings(source.metadata, source.path, len(source))
        configs = meta.architecture
        if meta.family != "stable_diffusion":
            return None, f"data-free: models of the family {meta.family!r} are not run here"
        if not configs.get("text_encoder"):
            return None, "data-free: the file holds no text encoder to make its prompts' embeddings"
        unet, text = (empty(name, meta, source.path) for name in ("unet", "text_encoder"))
        names = layouts.unet_to_ldm({n: n for n in unet.state_dict()}, configs["unet"])
        keys = {f"unet.{n}": layouts.UNET + ldm for ldm, n in names.items()}
        names = layouts.text_to_ldm({n: n for n in text.state_dict()})
        keys |= {f"text.{n}": layouts.TEXT + ldm for ldm, n in names.items()}
        shapes = {
            f"{part}.{n}": w.shape
            for part, net in (("unet", unet), ("text", text))
            for n, w in net.state_dict().items()
        }
        wrong = next((k for n, k in keys.items() if k not in source or source.entries[k].shape != shapes[n]), None)
        if wrong is not None:
            problem = f"{wrong!r} is missing, or of another shape than the metadata says"
            raise CheckpointError(f"{source.path}: wrong architecture: {problem}. {checkpoint.CURE}")
        self = cls({"unet": unet, "text": text}, keys, source)
        modules = {"unet": unet, "vae": _vae(source, meta), "text_encoder": text}
        self.model = StableDiffusion(modules, build_tokenizer(meta, source.path), meta, source.path.name)
        student = meta.guidance.get("baked")
        self.generator = Generator().manual_seed(options.seed)
        count = options.samples or (256 if student else 32)
        self.prompts, self.probe, said = prompts_for(self.model, options, count, prompts)
        self.steps = options.steps or meta.steps
        what = f"t = {meta.t_in:g}" if student and self.steps == 1 else f"its own {self.steps} steps"
        return self, f"calibrated on {said} at {what}"

    def run(self, progress: Progress) -> None:
        """Make a picture of every prompt, as the file says."""
        batch = 16
        for i in range(0, len(self.prompts), batch):
            progress(i, len(self.prompts), "calibrating")
            some = self.prompts[i : i + batch]
            z = randn(self.model.shape(len(some)), self.generator)
            self.model.latents(z, self.model.encode(some), self.steps, generator=self.generator)
        progress(len(self.prompts), len(self.prompts), "calibrating")

    def start(self) -> None:
        """(x_t, t) where the denoiser is compared: a student's start, or eight levels of a teacher's own pictures."""
        denoiser, schedule = self.model.denoiser, self.model.denoiser.schedule
        generator = Generator().manual_seed(PROBE_SEED)
        student = self.model.meta.guidance.get("baked")
        if not student:
            self.probe = self.probe[: PROBES // 8]
        z = randn(self.model.shape(len(self.probe)), generator)
        if student:
            t = torch.full((len(z),), float(schedule.time(self.model.meta.t_in)))
            self.points = [(prior_scale(denoiser, t, z) * z, t)]
            return
        x0 = self.model.latents(z, self.model.encode(self.probe), self.steps)
        times = [torch.full((len(x0),), (i + 1) / 8) for i in range(8)]
        self.points = [(schedule.noise(x0, t, randn(x0.shape, generator)), t) for t in times]

    def outputs(self) -> Tensor:
        """x0 at the points that `start` made."""
        cond = self.model.encode(self.probe)
        return torch.cat([self.model.denoiser(x, t, cond) for x, t in self.points])

    def pictures(self, outputs: Tensor) -> Tensor | None:
        """x0, decoded."""
        return None if "vae" not in self.model.parts else self.model.decode(outputs)


def prompts_for(
    model: StableDiffusion, options: Quantize, count: int, prompts: Prompts | None
) -> tuple[list[str], list[str], str]:
    """(to calibrate on, to measure on, what to call the former): from the options' file, else from the caller, else
    general ones. Raises ValueError for a file without any."""
    if options.prompts is None and prompts is not None and (found := prompts(model, count, options.seed)) is not None:
        return found, prompts(model, PROBES, PROBE_SEED), f"{count} prompts"
    given, said = given_prompts(options, count)
    return given, given_prompts(options, PROBES, last=True)[0], said


def _vae(source: Source, meta: Metadata) -> nn.Module | None:
    """The decoder, whole and in fp32: it is small."""
    weights = checkpoint.part({k: source[k] for k in source if k.startswith(layouts.VAE)}, layouts.VAE)
    config = meta.architecture.get("vae")
    if not weights or config is None:
        return None
    weights = layouts.vae_to_diffusers(weights, config)
    return fill(source.path, "vae", empty("vae", meta, source.path), weights, torch.float32)
