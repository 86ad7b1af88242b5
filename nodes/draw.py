"""Pictures from any MODEL that says how it is called, timed: for the nodes that measure and compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..distill.bench import wait_for
from .families import prepare


def encode(clip, text: str) -> list:
    """A prompt as CLIP Text Encode gives it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def lines(text: str, what: str) -> list[str]:
    """One entry a line. Raises ValueError where there is none."""
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{what} is empty: write one or more, one a line.")
    return found


class Caller:
    """A MODEL called as its recipe says: in its own steps, with the guidance that is not in its weights already."""

    def __init__(self, model, clip, hidden=None, name: str = "model"):
        """hidden: the node's; name: of its input that the MODEL came by. Raises ValueError for one without a recipe."""
        ready, self.seconds = prepare(model, hidden=before(hidden, name)), 0.0
        self.sampler, self.sigmas, self.cfg = ready.sampler, ready.sigmas, ready.recipe.guidance
        self.model = ready.model.clone()
        self.model.add_wrapper(WrappersMP.SAMPLER_SAMPLE, self._timed)
        self.null = encode(clip, "") if self.cfg != 1 else None
        self.steps = len(self.sigmas) - 1

    def __call__(self, positive: list, latent: dict[str, Any], count: int, seed: int) -> Tensor:
        """(count, C, h, w) of the size of an empty latent, the noise of the seed as KSampler has it."""
        empty = comfy.sample.fix_empty_latent_channels(
            self.model, latent["samples"][:1], latent.get("downscale_ratio_spacial")
        )
        empty = torch.zeros_like(empty).repeat(count, *[1] * (empty.ndim - 1))
        noise = comfy.sample.prepare_noise_inner(empty, torch.Generator().manual_seed(seed))
        guider = comfy.samplers.CFGGuider(self.model)
        conds = {"positive": positive} | ({"negative": self.null} if self.null is not None else {})
        guider.inner_set_conds(conds)
        guider.set_cfg(self.cfg)
        return guider.sample(noise, empty, self.sampler, self.sigmas, disable_pbar=True, seed=seed)

    def _timed(self, sample: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """ComfyUI's wrapper around a sampler: loading the weights is before it."""
        device = mm.get_torch_device()
        wait_for(device)
        start = time.perf_counter()
        out = sample(*args, **kwargs)
        wait_for(device)
        self.seconds = time.perf_counter() - start
        return out


def before(hidden, name: str):
    """A node's hidden inputs as the node has them that one of its inputs comes from; None outside of a graph."""
    if hidden is None or hidden.dynprompt is None:
        return None
    source = hidden.dynprompt.get_node(hidden.unique_id)["inputs"][name][0]
    return SimpleNamespace(unique_id=source, dynprompt=hidden.dynprompt)


def file_of(model) -> Path | None:
    """The file that a MODEL was loaded from, where its loader says so."""
    init = getattr(model, "cached_patcher_init", None)
    path = init and next((a for a in init[1] if isinstance(a, str | Path)), None)
    return Path(path) if path and Path(path).is_file() else None


class Bar:
    """ComfyUI's progress bar, and its Cancel button."""

    def __init__(self, total: int):
        self.bar, self.total, self.done = comfy.utils.ProgressBar(total), total, 0

    def step(self) -> None:
        mm.throw_exception_if_processing_interrupted()
        self.done += 1
        self.bar.update_absolute(self.done, self.total)


def to_image(picture) -> Tensor:
    """A PIL image -> ComfyUI's IMAGE (1, H, W, 3) in [0, 1]."""
    data = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(1, picture.height, picture.width, 3) / 255
