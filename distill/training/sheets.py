"""Sheets of pictures: the same prompts and the same noise after every so many steps, so that a run can be watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, nn

from ..backbones.base import Backbone
from ..backbones.drawing import to_pil
from ..denoiser import Cond, map_cond
from ..sample import few_step
from ..schedule import randn
from ..shards import leaves

if TYPE_CHECKING:
    from PIL.Image import Image


def sheets(
    teacher: Backbone, cond: Cond, timesteps: Sequence[float] | None = None, seed: int = 0
) -> Callable[[nn.Module], Image]:
    """sheet(net) -> the pictures of a student, side by side in rows of at most eight.

    cond: of the prompts to show; timesteps: of the student's calls, by default one at the teacher's noisiest. The noise
    comes from the seed alone. A student elsewhere, as an average kept on the CPU, visits the teacher's device.
    """
    count = len(leaves(cond)[0])
    z = randn(teacher.shape(count), Generator().manual_seed(seed), "cpu")
    times = [teacher.time(i) for i in timesteps or [None]]

    @torch.no_grad()
    def sheet(net: nn.Module) -> Image:
        from PIL import Image

        home = next(net.parameters()).device
        student = few_step(teacher.wrap(net.to(teacher.device)), times)
        rows = range(count)  # one by one: a sheet may not need more memory than training
        noise = Generator().manual_seed(seed + 1)
        latents = [
            student(z[i : i + 1].to(teacher.device), map_cond(lambda c, i=i: c[i : i + 1], here), noise) for i in rows
        ]
        net.to(home)
        pictures = [to_pil(teacher.decode(x))[0] for x in latents]
        width, height = pictures[0].size
        page = Image.new("RGB", (width * min(count, 8), height * -(-count // 8)))
        for i, picture in enumerate(pictures):
            page.paste(picture, (width * (i % 8), height * (i // 8)))
        return page

    here = map_cond(lambda c: c.to(teacher.device), cond)
    return sheet
