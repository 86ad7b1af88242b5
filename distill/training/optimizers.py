"""The optimisers, and their state as tensors by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .options import TrainOptions


def make_optimizer(options: TrainOptions, params: list[nn.Parameter], lr: float) -> Optimizer:
    """AdamW, fused, or with moments of 8 bits. Raises ImportError where bitsandbytes is needed and absent."""
    how = {"lr": lr, "betas": options.betas, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(params, **how, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ImportError("adamw8bit needs bitsandbytes: pip install bitsandbytes", name="bitsandbytes") from None
    return AdamW8bit(params, **how)


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """What an optimiser keeps of its parameters: "0/exp_avg" and so on; numbers as tensors. Each has memory of its own,
    as a file wants it: of bitsandbytes' tables, which parameters share, there are copies."""
    seen: set[int] = set()

    def walk(tree: Mapping, name: str) -> Iterator[tuple[str, Tensor]]:
        for key, v in tree.items():
            if isinstance(v, Mapping):
                yield from walk(v, f"{name}{key}/")
            else:
                v = v if isinstance(v, Tensor) else torch.tensor(v)
                shares = v.numel() > 0 and v.data_ptr() in seen
                seen.add(v.data_ptr())
                yield f"{name}{key}", v.clone() if shares else v

    return dict(walk(optimizer.state_dict()["state"], ""))


def load_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave."""
    state: dict[int, dict[str, Any]] = {}
    for name, v in tensors.items():
        i, *parents, key = name.split("/")
        place = state.setdefault(int(i), {})
        for parent in parents:
            place = place.setdefault(parent, {})
        plain = v.dim() == 0 and not isinstance(optimizer, torch.optim.AdamW)  # bitsandbytes counts steps so
        place[key] = v.item() if plain else v
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
