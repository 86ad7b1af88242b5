"""State dicts seen another way, tensor by tensor, when they are asked for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..packed.weight import QuantizedWeight, layers


class Renamed(Mapping):
    """Tensors under other names; kept in memory as fp32 where `keep` says so."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str], keep: bool = False):
        """names: new name -> the one in `tensors`."""
        self.tensors, self.names, self.keep, self.kept = tensors, dict(names), keep, {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        if name not in self.names:
            raise KeyError(f"the file has no weight for {name}")
        t = self.tensors[self.names[name]]
        if self.keep:
            self.kept[name] = t = t.float()
        return t

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Dequantized(Mapping):
    """Any state dict as a dense one; a layer of the contract is dequantized when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.marked = tensors, set(layers(tensors))
        ends = (".weight", ".bias")
        self.names = [k for k in tensors if k.endswith(ends) or k.rpartition(".")[0] not in self.marked]

    def __getitem__(self, key: str) -> Tensor:
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and layer in self.marked:
            return QuantizedWeight.from_tensors(self.tensors, layer).dequantize().contiguous()
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
