"""Low-rank adapters (LoRA, 2106.09685): W x + (alpha / rank) up(down(x)), W frozen, up and down trained.

An adapted net is a second tree of modules over the tensors of the first. So a teacher, its LoRA student and its LoRA
coach together hold one set of weights, and nothing is switched between their calls: the teacher cannot change, and the
second forward of gradient checkpointing runs what the first one ran.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

Adapters = Mapping[str, Tensor]
"""By name of the adapted layer: NAME.lora_A.weight (rank, in, ...) is down, NAME.lora_B.weight (out, rank, ...) up."""


def adaptable(net: nn.Module) -> dict[str, nn.Module]:
    """The layers that take adapters, by name: Linear, and Conv2d without groups."""
    kinds = (nn.Linear, nn.Conv2d)
    return {n: m for n, m in net.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1}


def chosen(net: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers that `targets`, names or endings of names, mean; None means all. Raises ValueError for a
    target that means none."""
    every = list(adaptable(net))
    if targets is None:
        return every
    meant = {t: {n for n in every if n == t or n.endswith(f".{t}")} for t in targets}
    for target, found in meant.items():
        if not found:
            raise ValueError(
                f"target {target!r} is no Linear or Conv2d of the net, which has {', '.join(every[:3])}, ..."
            )
    return [n for n in every if any(n in found for found in meant.values())]


def shared(net: nn.Module, tensors: Iterable[Tensor] | None = None) -> nn.Module:
    """A copy of a net that holds some tensors in common with it, by default all of them."""
    common = chain(net.parameters(), net.buffers()) if tensors is None else tensors
    return copy.deepcopy(net, {id(t): t for t in common})


class Lora:
    """A frozen net with adapters. `net` itself stays as it is; `module`, the adapted one, shares its tensors.

    targets: see `chosen`. alpha: default twice the rank (SwiftBrush v2: rank 64 and 256, alpha 128 and 512). The
    adapters start at zero effect, drawn from `generator` alone.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        generator: Generator | None = None,
    ):
        from peft import LoraConfig, inject_adapter_in_model

        self.rank, self.alpha = rank, 2.0 * rank if alpha is None else alpha
        config = LoraConfig(r=rank, lora_alpha=self.alpha, target_modules=chosen(net, targets))
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
            self.module = inject_adapter_in_model(config, shared(net.requires_grad_(False)))
        self._adapters = {n.replace(".default", ""): p for n, p in self.module.named_parameters() if p.requires_grad}
        for name, p in self._adapters.items():
            if "lora_A" in name:  # the same law as peft's, from our generator; lora_B is zero
                nn.init.kaiming_uniform_(p, a=5**0.5, generator=generator)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters."""
        return list(self._adapters.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The adapters by name."""
        return {name: p.detach() for name, p in self._adapters.items()}

    def load_state_dict(self, state: Adapters) -> None:
        """Put back what `state_dict` gave. Raises KeyError for adapters of another rank, net or other targets."""
        shapes = ({n: v.shape for n, v in some.items()} for some in (state, self._adapters))
        if odd := sorted({n for n, _ in set.symmetric_difference(*(set(s.items()) for s in shapes))}):
            raise KeyError(f"other adapters than these, e.g. {odd[0]}: same rank, targets and net needed")
        with torch.no_grad():
            for name, p in self._adapters.items():
                p.copy_(state[name])


@dataclass(frozen=True)
class Folded:
    """Adapters that have their scale in the way up, as if alpha were the rank: what files hold, as a loader that knows
    no alpha takes that."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    """What they were trained with."""

    def unfolded(self) -> dict[str, Tensor]:
        """What `Lora.load_state_dict` takes, for the same rank and alpha."""
        scale = self.alpha / self.rank
        return {n: v / scale if n.endswith(".lora_B.weight") else v for n, v in self.tensors.items()}

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(down, up) by the name of the layer."""
        names = [n.removesuffix(".lora_A.weight") for n in self.tensors if n.endswith(".lora_A.weight")]
        return {n: (self.tensors[f"{n}.lora_A.weight"], self.tensors[f"{n}.lora_B.weight"]) for n in names}


def of(module: nn.Module) -> Folded | None:
    """The adapters in an adapted net, such as a LoRA student or its average; None for a net without."""
    tensors: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A"):
            rank, alpha, scale = (d["default"] for d in (layer.r, layer.lora_alpha, layer.scaling))
            tensors[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight.detach()
            tensors[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight.detach() * scale
    return Folded(tensors, rank, float(alpha)) if tensors else None


def merged(net: nn.Module, adapters: Folded) -> nn.Module:
    """A net with adapters added to its weights, in fp32; it shares all others with `net`, which stays as it is. Raises
    ValueError for adapters of a layer that the net does not have so."""
    net = shared(net)
    layers = adaptable(net)
    for name, (down, up) in adapters.pairs().items():
        weight = getattr(layers.get(name), "weight", None)
        if weight is None or (len(up), *down.shape[1:]) != tuple(weight.shape):
            raise ValueError(f"{name} takes no adapter of {tuple(down.shape)} and {tuple(up.shape)}")
        added = (up.float().flatten(1) @ down.float().flatten(1)).view(weight.shape)
        layers[name].weight = nn.Parameter((weight.float() + added.to(weight.device)).to(weight.dtype), False)
    return net


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, n) -> u (m, k), s (k,), v (n, k): the matrix is u diag(s) v^T."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.t()


def extracted(before: nn.Module, after: nn.Module, rank: int) -> tuple[Folded, float]:
    """Adapters that make a net of another as nearly as their rank can, by singular values, zeros where a layer has
    fewer and no more than the largest has; and what is left of the difference, as a share of its norm, weights that
    take no adapters included."""
    tensors: dict[str, Tensor] = {}
    old, takes = dict(before.named_parameters()), adaptable(after)
    rank = min(rank, max((min(m.weight.flatten(1).shape) for m in takes.values()), default=1))
    total = left = 0.0
    for name, p in after.named_parameters():
        difference = (p - old[name]).detach().float()
        total, left = total + difference.square().sum().item(), left + difference.square().sum().item()
        layer = name.removesuffix(".weight")
        if layer in takes and name != layer:
            u, s, v = (m.narrow(-1, 0, min(rank, m.shape[-1])) for m in svd(difference.flatten(1)))
            down, up = (pad(m * s.sqrt(), (0, rank - len(s))) for m in (v, u))
            tensors[f"{layer}.lora_A.weight"] = down.t().reshape(rank, *p.shape[1:])
            tensors[f"{layer}.lora_B.weight"] = up.view(-1, rank, *[1] * (p.ndim - 2))
            left -= s.square().sum().item()
    return Folded(tensors, rank, float(rank)), (max(left, 0.0) / total) ** 0.5 if total else 0.0
