"""What flows into each layer while a model runs: the mean size of every input channel, and a sample of its rows.

Hooks only: `collect` runs whatever it is given, on whatever modules, so ComfyUI's are calibrated like diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..packed.dispatch import pads_of
from ..packed.weight import QuantError, to_matrix


@dataclass(frozen=True)
class LayerStats:
    """The input of one layer, over a calibration run."""

    mean: Tensor
    """(in,): mean |x| of each input channel"""
    rows: Tensor
    """(R, K): a uniform sample of the rows the weight matrix meets, a convolution's patches in OHWI order"""
    low: Tensor | None = None
    """(in,): the smallest x of each input channel; None: that of the rows"""
    high: Tensor | None = None
    """(in,): the largest"""

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """low and high, both (in,)."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        rows = self.rows.view(-1, len(self.mean))
        return rows.amin(0), rows.amax(0)

    @property
    def peak(self) -> Tensor:
        """(in,): max |x| of each input channel."""
        low, high = self.range
        return torch.maximum(-low, high)


def collect(
    model: nn.Module, names: Mapping[str, str], run: Callable[[], None], rows: int = 256, seed: int = 0
) -> dict[str, LayerStats]:
    """Run `run()` and watch the modules of `model` in names (module name -> key of the layer in the file).

    A layer that the run never calls is missing from the result. Raises QuantError where an input is not finite.
    """
    generator = Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    watched = {key: _Watch(key, modules[name], rows, generator) for name, key in names.items()}
    try:
        with torch.no_grad():
            run()
    finally:
        for watch in watched.values():
            watch.handle.remove()
    return {key: watch.stats() for key, watch in watched.items() if watch.count}


class _Watch:
    """Keeps a uniform sample of all rows that pass: each row draws a number, and the smallest `limit` stay."""

    def __init__(self, key: str, module: nn.Module, limit: int, generator: Generator):
        self.key, self.limit, self.generator, self.count = key, limit, generator, 0
        self.total = self.low = self.high = self.rows = None
        self.draws = torch.empty(0)
        self.handle = module.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        conv = isinstance(module, nn.Conv2d)
        channels = x.movedim(1, -1).flatten(0, -2) if conv else x.flatten(0, -2)  # (M, in)
        low, high = (t.float().cpu() for t in channels.aminmax(dim=0))
        if not (low.isfinite() & high.isfinite()).all():
            raise QuantError(f"layer {self.key}: its input is not finite in calibration. Calibrate in fp32.")
        total = channels.abs().sum(0, dtype=torch.float32).cpu()
        first = self.total is None
        self.total = total if first else self.total + total
        self.low = low if first else torch.minimum(self.low, low)
        self.high = high if first else torch.maximum(self.high, high)
        self.count += len(channels)
        self.keep(patches(x, module) if conv else _RowsOf(channels))

    def keep(self, source: _RowsOf) -> None:
        """The sample over what was seen before and `source`: those with the smallest draws."""
        draws = torch.cat([self.draws, torch.rand(len(source), generator=self.generator)])
        chosen = draws.topk(min(self.limit, len(draws)), largest=False).indices
        old, new = chosen[chosen < len(self.draws)], chosen[chosen >= len(self.draws)] - len(self.draws)
        found = source[new].float().cpu()
        self.rows = found if self.rows is None else torch.cat([self.rows[old], found])
        self.draws = torch.cat([draws[old], draws[len(self.draws) :][new]])

    def stats(self) -> LayerStats:
        return LayerStats(self.total / self.count, self.rows, self.low, self.high)


class _RowsOf:
    """Rows of a matrix, by index."""

    def __init__(self, x: Tensor):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.x[index.to(self.x.device)]


class patches(_RowsOf):
    """The patches that a convolution sees in x (B, C, H, W), as rows (kh * kw * C); only the asked ones are cut out."""

    def __init__(self, x: Tensor, conv: nn.Conv2d):
        (self.kh, self.kw), (self.sh, self.sw), (self.dh, self.dw) = conv.kernel_size, conv.stride, conv.dilation
        pads = pads_of(conv.padding, conv.kernel_size, conv.dilation)
        mode = conv.padding_mode.replace("zeros", "constant")
        self.x = F.pad(x, pads, mode=mode).permute(0, 2, 3, 1)  # (B, H, W, C)
        self.h = (self.x.shape[1] - self.dh * (self.kh - 1) - 1) // self.sh + 1
        self.w = (self.x.shape[2] - self.dw * (self.kw - 1) - 1) // self.sw + 1

    def __len__(self) -> int:
        return len(self.x) * self.h * self.w

    def __getitem__(self, index: Tensor) -> Tensor:
        index = index.to(self.x.device)
        b, y, x = index // (self.h * self.w), index // self.w % self.h * self.sh, index % self.w * self.sw
        i = torch.arange(self.kh, device=index.device)[None, :, None] * self.dh + y[:, None, None]  # (R, kh, 1)
        j = torch.arange(self.kw, device=index.device)[None, None, :] * self.dw + x[:, None, None]  # (R, 1, kw)
        return self.x[b[:, None, None], i, j].flatten(1)  # (R, kh * kw * C)


# --------------------------------------------------------------------------------------- what a weight does to rows


def output_error(difference: Tensor, rows: Tensor) -> float:
    """Mean square of what an error (N, K) of the weight adds to the output for these rows."""
    return (rows @ difference.t()).square_().mean().item()


def relative_error(dense: Tensor, stands_for: Tensor, stats: LayerStats | None) -> float:
    """L2 error over L2 norm: of the layer's output (without bias) where its rows are known, else of its weight."""
    w, d = to_matrix(dense).float(), to_matrix(stands_for - dense).float()
    if stats is not None:
        w, d = stats.rows @ w.t(), stats.rows @ d.t()
    return (d.norm() / w.norm().clamp(min=1e-30)).item()
