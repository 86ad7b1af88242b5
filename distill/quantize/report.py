"""What quantizing a model cost and gained: a short table for people, JSON for machines and for the file's metadata."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Layer:
    """One matrix weight."""

    name: str
    choice: str
    """such as "4 bits, groups of 64"; "dense" and why"""
    numel: int
    bits_per_weight: float
    error: float | None = None
    """relative L2: of its output where its inputs were seen, else of its weight; None: dense"""
    kind: str = ""
    """what the error is of: output or weight"""


@dataclass
class Report:
    """What happened to a model, layer by layer and in sum."""

    source: str
    out: str
    method: str
    calibration: str
    """on what the method was calibrated, or why it was not"""
    layers: list[Layer] = field(default_factory=list)
    sensitivity: str = ""
    """what the mixed precision was decided by; "" where all layers are alike"""
    size_before: int = 0
    size_after: int = 0
    output_error: float | None = None
    """relative L2 of what the model puts out against the original; None where it could not be run"""
    psnr: float | None = None
    """of the pictures, in dB, peak to peak 2"""
    seconds: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Over all matrix weights of the quantized parts, dense ones counted as stored; embedding tables are none."""
        total = sum(layer.numel for layer in self.layers)
        return sum(layer.numel * layer.bits_per_weight for layer in self.layers) / max(total, 1)

    def summary(self) -> dict[str, Any]:
        """What goes into the file's metadata beside the options."""
        errors = [layer.error for layer in self.layers if layer.error is not None]
        return {
            "bits_per_weight": round(self.bits_per_weight, 4),
            "calibration": self.calibration,
            "sensitivity": self.sensitivity,
            "choices": dict(Counter(layer.choice for layer in self.layers)),
            "layers": {layer.name: layer.choice for layer in self.layers} if self.sensitivity else {},
            "mean_layer_error": round(sum(errors) / len(errors), 5) if errors else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"bits_per_weight": self.bits_per_weight}

    def table(self) -> str:
        """A short table: choices and how many layers took them, then the totals."""
        groups: dict[str, list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.choice, []).append(layer)
        width = max((len(c) for c in groups), default=0)
        lines = [f"{'':<{width}}  {'layers':>6} {'M numbers':>10} {'bits each':>10} {'error':>8}"]
        for choice, layers in sorted(groups.items(), key=lambda item: -sum(x.numel for x in item[1])):
            numel = sum(x.numel for x in layers)
            bits = sum(x.numel * x.bits_per_weight for x in layers) / numel
            errors = [x.error for x in layers if x.error is not None]
            error = f"{sum(errors) / len(errors):8.4f}" if errors else f"{'-':>8}"
            lines.append(f"{choice:<{width}}  {len(layers):>6} {numel / 1e6:>10.2f} {bits:>10.2f} {error}")
        before, after = self.size_before / 2**20, self.size_after / 2**20
        lines.append(f"{self.out}: {after:.1f} MiB of {before:.1f}, {self.bits_per_weight:.2f} bits per weight")
        lines.append(f"method {self.method}; {self.calibration}")
        if self.sensitivity:
            lines.append(f"mixed precision by {self.sensitivity}")
        if self.output_error is not None:
            psnr = "" if self.psnr is None else f", PSNR of its pictures {self.psnr:.1f} dB"
            lines.append(f"output error {self.output_error:.4f}{psnr}")
        lines.append(f"{self.seconds:.1f} s")
        return "\n".join(lines)
