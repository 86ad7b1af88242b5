"""Options of the loop, the same for every method. Learning rates are a method's own."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from ..checks import SEEDS, need, positive, within


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run, whatever the method."""

    steps: int | None = 2000
    """Iterations, coach warm-up included. None: only `minutes` ends the run."""
    minutes: float | None = None
    """Time budget; the run ends at whichever of the two comes first, and the learning rate falls in step with it."""
    betas: tuple[float, float] = (0.5, 0.99)
    """AdamW, all nets: little momentum, as the target moves (tutorial world; SiD has beta1 = 0)."""
    weight_decay: float = 0.01
    """AdamW, all nets (DMD2)."""
    clip: float = 1.0
    """Largest gradient norm, each net (SwiftBrush)."""
    lr_warmup: int = 0
    """Steps of linear rise (DMD2: 500 at SD's size)."""
    decay_from: float = 0.5
    """The learning rates fall along a cosine after this fraction of the run (tutorial world)."""
    lr_end: float = 0.0
    """What is left of the learning rates at the end, as a fraction."""
    ema: float | None = 0.99
    """Decay of the averaged student, after a warm-up of min(ema, (1 + n) / (10 + n)) (tutorial world). None: no
    average and no memory for one."""
    accumulate: int = 1
    """Batches per step, for every net."""
    log_every: int = 10
    """Iterations per row of log.csv; a row is the mean over them."""
    save_every: int = 100
    """Iterations per checkpoint: what a killed process loses at most."""
    keep: int = 2
    """Checkpoints kept."""
    seed: int = 0
    """Of every random number in the run."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast of the nets' insides (losses stay fp32). No fp16: the loss is a difference of near equals (SiD-LSG)."""
    gradient_checkpointing: bool = False
    """Compute activations again where they are needed, in place of keeping them: far less memory, a third more time."""
    compile: bool = False
    """torch.compile the nets: minutes at first, then faster steps on a GPU."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: bitsandbytes', whose moments take a byte each in place of four."""
    ema_on_cpu: bool = False
    """Keep the average of a full student in the CPU's memory; each step then copies its weights there."""
    sheet_every: int | None = 500
    """Iterations per sheet of pictures of the averaged student, from the same prompts and noise. None: no sheets."""
    tracker: Literal["tensorboard", "wandb"] = "tensorboard"
    """tensorboard: where it is installed. wandb: Weights & Biases beside it."""
    max_spread: float = 10.0
    """Stop when the samples' standard deviation exceeds this; latents have about 1 by the file contract."""

    def __post_init__(self) -> None:
        need(self.steps is not None or self.minutes is not None, "steps", None, "give steps or minutes")
        within(self, steps=(1, inf), accumulate=(1, inf), log_every=(1, inf), save_every=(1, inf), keep=(1, inf))
        within(self, sheet_every=(1, inf), seed=SEEDS)
        within(self, lr_warmup=(0, inf), weight_decay=(0, inf), decay_from=(0, 1), lr_end=(0, 1))
        need(self.ema is None or 0 <= self.ema < 1, "ema", self.ema, "0 or more, below 1")
        need(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "0 or more, below 1")
        positive(self, "minutes", "clip", "max_spread")
