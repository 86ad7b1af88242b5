"""FSDP2: a net's weights, gradients, moments and average cut into one piece for each process.

Where accelerate was launched for it (`--use_fsdp --fsdp_version 2`), nets of which all is trained are given to torch's
`fully_shard`. Nets with adapters hold tensors in common with the teacher and stay whole, as the teacher does. What is
left of a run is whole tensors, so that any number of processes goes on with it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import need
from .options import TrainOptions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

    from ..methods.base import Net

_plain: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""Sharded nets -> what they were before, without weights: torch cannot copy a sharded one."""


def mesh_of(accelerator: Accelerator, device: torch.device, options: TrainOptions) -> DeviceMesh | None:
    """The processes to shard over; None where accelerate was not told to, or there is but one. Raises ValueError for
    what does not go with sharded nets."""
    from accelerate.utils import parse_flag_from_env
    from torch.distributed.device_mesh import init_device_mesh

    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    need(version == "2", "fsdp_version", version, "launch with --fsdp_version 2")
    for name, only in (("optimizer", "adamw"), ("compile", False), ("ema_on_cpu", False)):
        need(getattr(options, name) == only, name, getattr(options, name), f"sharded nets (FSDP) take only {only}")
    return init_device_mesh(device.type, (accelerator.num_processes,))


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a net's parameters along their first dimension, in place, block by block: those blocks of diffusers' nets
    that it says are not to be split further, then what is left. Parameters are new objects afterwards."""
    from torch.distributed.fsdp import fully_shard

    _plain[net] = copy.deepcopy(net, {id(p): nn.Parameter(p.to("meta"), False) for p in net.parameters()})
    blocks = {name for m in net.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    for module in reversed(list(net.modules())):  # inner ones first
        if module is net or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)  # no weights stay behind to grow stale


def shard_all(nets: Mapping[str, Net], averages: Mapping[str, nn.Module], mesh: DeviceMesh) -> None:
    """Shard those of a run's nets of which all is trained, and their averages. Raises ValueError where none is."""
    found = 0
    for name, net in nets.items():
        inner = getattr(net.trained, "trained", net.trained)
        if isinstance(inner, nn.Module) and all(p.requires_grad for p in inner.parameters()):
            found += 1
            for module in {inner, averages.get(name, inner)}:
                shard(module, mesh)
    need(found > 0, "nets", "LoRA", "adapters are not sharded (FSDP); launch with --multi_gpu")


def uncut(params: Iterable[Tensor]) -> list[Tensor]:
    """Those that every process has whole, whose gradients nobody has averaged yet."""
    return [p for p in params if not hasattr(p, "full_tensor")]


def full(tensor: Tensor) -> Tensor:
    """A tensor whole, itself where it is; of one that is cut, all processes have to ask at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors whole, those that were cut on the CPU; {} where not `keep`. All processes have to ask at once."""
    whole = ((name, full(v).to("cpu") if hasattr(v, "full_tensor") else v) for name, v in tensors.items())
    return dict([(name, v) for name, v in whole if keep])


def cut(tensors: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors, the same in all processes, cut as those of the same name in `like` are."""
    from torch.distributed.tensor import distribute_tensor

    def one(v: Tensor, now: Any) -> Tensor:
        if not hasattr(now, "full_tensor") or v.shape != now.shape:
            return v
        return distribute_tensor(v.to(now.device), now.device_mesh, now.placements, src_data_rank=None)

    return {name: one(v, like.get(name)) for name, v in tensors.items()}


def whole(net: nn.Module, keep: bool = True) -> nn.Module | None:
    """A net that can be saved and copied: itself where it is whole; of a sharded one an equal one on the CPU, None
    where not `keep`. All processes have to ask at once."""
    if net not in _plain:
        return net
    found = gathered(net.state_dict(), keep)
    if not keep:
        return None
    plain = copy.deepcopy(_plain[net])
    plain.load_state_dict(found, assign=True)
    return plain.requires_grad_(False).eval()
