"""What the commands share: devices, bars, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


SHOWN = ("pairs", "student_loss", "coach_loss", "rel_gap", "coach_ratio", "x_std")


@contextmanager
def bars() -> Iterator[Callable[..., None]]:
    """told(what, share, **readouts) -> one bar for each `what`, so that its time left is that stage's."""
    from tqdm import tqdm

    open_: dict[str, tqdm] = {}

    def told(what: str, share: float, **readouts: float) -> None:
        if what not in open_:
            for bar in open_.values():
                bar.close()
            layout = "{desc:<14}{percentage:3.0f}%|{bar:24}| {elapsed} left {remaining}{postfix}"
            open_[what] = tqdm(total=1.0, desc=what, bar_format=layout, mininterval=0.5)
        open_[what].set_postfix({k: f"{readouts[k]:.4g}" for k in SHOWN if k in readouts}, refresh=False)
        open_[what].update(min(1.0, share) - open_[what].n)

    try:
        yield told
    finally:
        for bar in open_.values():
            bar.close()
