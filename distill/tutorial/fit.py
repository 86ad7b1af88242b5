"""The plain supervised loop behind the VAE, the text encoder, the judge and the teacher."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit(
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    minutes: float,
    lr: float,
    seed: int,
    name: str,
    ema: float = 0.999,
    warm_up: int = 100,
    flat: float = 0.5,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    every: Callable[[nn.Module, float], None] | None = None,
    every_minutes: float = 10,
) -> nn.Module:
    """Minimise `loss(generator)` over `module` for a time budget and return its EMA copy.

    The learning rate is flat for a share `flat` of the budget, then falls to zero along a cosine. `every(ema module,
    minutes passed)` is called now and then, to save or to evaluate.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=lr, betas=betas, weight_decay=weight_decay, fused=True
    )
    average = copy.deepcopy(module).requires_grad_(False)
    start, step, log, said, called = time.time(), 0, 0.0, 0.0, 0.0
    while (passed := (time.time() - start) / 60) < minutes:
        p = passed / minutes
        fall = 1.0 if p < flat else 0.5 + 0.5 * torch.tensor((p - flat) / (1 - flat) * torch.pi).cos().item()
        for group in optimiser.param_groups:
            group["lr"] = lr * fall * min(1.0, (step + 1) / warm_up)
        value = loss(generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), [q.data for q in module.parameters()], 1 - decay)
        for mine, theirs in zip(average.buffers(), module.buffers()):
            mine.copy_(theirs)
        log = value.item() if step == 1 else 0.98 * log + 0.02 * value.item()
        if passed - said > 0.25:
            said = passed
            print(f"{name}: {passed:.1f}/{minutes:g} min, step {step}, loss {log:.5f}", flush=True)
        if every and passed - called > every_minutes:
            called = passed
            every(average, passed)
    print(f"{name}: {step} steps, loss {log:.5f}", flush=True)
    return average.eval()
