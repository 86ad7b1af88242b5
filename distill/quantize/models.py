"""A model that is being quantized, as something that runs: to calibrate it, and to see what rounding does to it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn

from .. import layouts
from ..backbones.stable_diffusion import StableDiffusion, build_tokenizer, empty, fill
from ..file import checkpoint
from ..file.metadata import Metadata
from ..header import CheckpointError
from ..packed.weight import QuantizedWeight, layers
from ..sample import prior_scale
from ..schedule import randn
from ..training.prompts import read_prompts
from ..tutorial import shapes
from .calibrate import LayerStats, collect
from .source import Source
from .stream import IN_MEMORY, Dequantized, Renamed, rounding_activations, stream

CHEAP = 2e10
"""weights run through (those of the model times the candidates tried) up to which sensitivity is measured end to end:
minutes on a CPU. A model of 50 M weights with 100 layers is there; above it each layer is judged by itself"""
PROBES = 32
"""pictures, or denoiser calls, that the output error is measured on: not those of calibration"""
PROBE_SEED = 8191


def open_subject(source: Source, options, parts: tuple[str, ...]) -> tuple[Subject | None, str]:
    """The subject for a source and what it is calibrated on; or None and why it cannot be run."""
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
    except ImportError as e:
        return None, f"data-free: running it needs {e.name} (pip install onestep[distill])"
    if source.is_onestep:
        return OneStep.open(source, options, parts)
    if source.folder is None:
        return None, "data-free: a single file does not say how it is run (give its diffusers folder to calibrate)"
    from .folders import open_folder

    return open_folder(source, options)


class Subject:
    """Modules without weights, fed from the file; `names` tells which of them are layers to quantize."""

    def __init__(self, modules: dict[str, nn.Module], keys: Mapping[str, str], source: Source):
        """keys: name of a parameter in `modules` ("unet.conv_in.weight") -> its key in the file."""
        self.modules, self.keys = nn.ModuleDict(modules), dict(keys)
        self.size = sum(source.entries[k].numel for k in self.keys.values())
        self.weights = ChainMap({}, Renamed(source, self.keys, keep=self.size < IN_MEMORY))
        self.names = {n.removesuffix(".weight"): k.removesuffix(".weight") for n, k in self.keys.items()}
        self.module_of = {layer: name for name, layer in self.names.items()}
        stream(self.modules, self.weights)
        self.reference: Tensor | None = None

    def run(self, progress: Callable[[int, int, str], None]) -> None:
        """Work as in real use, on all calibration prompts."""
        raise NotImplementedError

    def start(self) -> None:
        """Make the inputs of `outputs`, after `run`."""

    def outputs(self) -> Tensor:
        """What the model puts out on a few fixed inputs."""
        raise NotImplementedError

    def pictures(self, outputs: Tensor) -> Tensor | None:
        """Those outputs as pictures in [-1, 1], where there is a decoder."""
        return None

    # ------------------------------------------------------------------------------------ what quantizing asks

    def calibrate(self, chosen: list[str], options, progress) -> dict[str, LayerStats]:
        wanted = set(chosen)
        kinds = (nn.Linear, nn.Conv2d)
        modules = dict(self.modules.named_modules())
        names = {n: k for n, k in self.names.items() if k in wanted and isinstance(modules.get(n), kinds)}
        stats = collect(self.modules, names, lambda: self.run(progress), options.rows, options.seed)
        with torch.no_grad():
            self.start()
            self.reference = self.outputs()
        return stats

    def is_cheap(self, runs: int) -> bool:
        return runs * self.size <= CHEAP

    @torch.no_grad()
    def damage(self, layer: str, dense: Tensor, q: QuantizedWeight) -> float:
        """Squared relative error of the outputs with one layer quantized."""
        if layer not in self.module_of:
            return 0.0  # the run never uses it
        name = self.module_of[layer] + ".weight"
        self.weights.maps[0][name] = q.dequantize()
        try:
            return self.error(self.outputs()) ** 2
        finally:
            del self.weights.maps[0][name]

    @torch.no_grad()
    def compare(self, tensors: Mapping[str, Tensor]) -> tuple[float, float | None]:
        """Relative L2 error of the outputs with a quantized state dict, and the PSNR in dB of the pictures."""
        quantized = {self.module_of[n]: QuantizedWeight.from_tensors(tensors, n) for n in self.used(tensors)}
        self.weights.maps.insert(0, Renamed(Dequantized(tensors), self.keys))
        try:
            with rounding_activations(self.modules, quantized):
                found = self.outputs()
        finally:
            self.weights.maps.pop(0)
        before, after = self.pictures(self.reference), self.pictures(found)
        psnr = None if before is None else 10 * (4 / (before - after).square().mean().clamp(min=1e-12)).log10().item()
        return self.error(found), psnr

    def used(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return [n for n in layers(tensors) if n in self.module_of]

    def error(self, outputs: Tensor) -> float:
        return ((outputs - self.reference).norm() / self.reference.norm().clamp(min=1e-30)).item()


class OneStep(Subject):
    """A OneStep file: a student at its one timestep, a teacher along its own trajectory."""

    @classmethod
    def open(cls, source: Source, options, parts: tuple[str, ...]) -> tuple[OneStep | None, str]:
        meta = Metadata.from_strings(source.metadata, source.path)
        configs = meta.architecture
        if not configs.get("text_encoder"):
            return None, "data-free: the file holds no text encoder to make its prompts' embeddings"
        unet, text = empty("unet", meta), empty("text_encoder", meta)
        names = layouts.unet_to_ldm({n: n for n in unet.state_dict()}, configs["unet"])
        keys = {f"unet.{n}": layouts.UNET + ldm for ldm, n in names.items()}
        names = layouts.text_to_ldm({n: n for n in text.state_dict()})
        keys |= {f"text.{n}": layouts.TEXT + ldm for ldm, n in names.items()}
        missing = next((k for k in keys.values() if k not in source), None)
        if missing is not None:
            raise CheckpointError(f"{source.path}: wrong architecture: {missing!r} is missing. Write the file again.")
        self = cls({"unet": unet, "text": text}, keys, source)
        modules = {"unet": unet, "vae": _vae(source, meta), "text_encoder": text}
        self.model = StableDiffusion(modules, build_tokenizer(meta), meta, source.path.name)
        student = meta.guidance.get("baked")
        self.generator = Generator().manual_seed(options.seed)
        count = options.samples or (256 if student else 32)
        self.prompts, self.probe = prompts_for(options, count)
        self.steps = options.steps or meta.steps
        what = f"t = {meta.t_in:g}" if student and self.steps == 1 else f"its own {self.steps} steps"
        return self, f"calibrated on {count} prompts at {what}"

    def run(self, progress) -> None:
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
        cond = self.model.encode(self.probe)
        return torch.cat([self.model.denoiser(x, t, cond) for x, t in self.points])

    def pictures(self, outputs: Tensor) -> Tensor | None:
        return None if "vae" not in self.model.parts else self.model.decode(outputs)


def prompts_for(options, count: int) -> tuple[list[str], list[str]]:
    """(to calibrate on, to measure on): from the file of prompts, or of the tutorial's world."""
    if options.prompts is not None:
        given = read_prompts(options.prompts)
        return [given[i % len(given)] for i in range(count)], [given[-1 - i % len(given)] for i in range(PROBES)]
    seeds = (options.seed, PROBE_SEED)
    return tuple(shapes.sample_prompts(n, Generator().manual_seed(s)) for n, s in zip((count, PROBES), seeds))


def _vae(source: Source, meta: Metadata) -> nn.Module | None:
    """The decoder, whole and in fp32: it is small."""
    weights = checkpoint.part({k: source[k] for k in source if k.startswith(layouts.VAE)}, layouts.VAE)
    config = meta.architecture.get("vae")
    if not weights or config is None:
        return None
    weights = layouts.vae_to_diffusers(weights, config)
    return fill(source.path, "vae", empty("vae", meta), weights, torch.float32)
