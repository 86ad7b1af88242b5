"""Four bits of ours beside plain Q4_0 at equal bits: what each does to a net's output.

    OMP_NUM_THREADS=1 python benchmarks/four_bit_against_q4_0.py [--seeds 3] [--train-steps 300]

Nets of random weights are small and have Gaussian ones of gain 1. The same layers are rounded in every column and
activations stay in floating point, so that columns differ by the rounding alone:

    affine     a scale and a zero for 64 numbers, clipped by the weight's error: 4.5 bits
    Q4_0       ggml's: a scale for 32 numbers in the order (out, in, kh, kw), not fitted: 4.5 bits
    default    `quantize_` without calibration: the better of affine and signed scales, layer by layer, and a
               convolution's errors made to cancel within each kernel
    run        `quantize_` with calibration on other inputs than those of the table

The relative L2 error of each output, its mean over outputs and seeds, and in brackets the smallest and the largest
ratio of a seed's mean to Q4_0's. A one-step student decides where a prompt leaves much open, and a picture that decides
otherwise errs ten times as much as the rest: so the outputs are many, of prompts that say all and that say little.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from four_bit_layers import from_q4_0, to_q4_0
from torch import Tensor, nn

from distill.backbones import load
from distill.packed.weight import group_for
from distill.quantize.module import quantize_
from distill.quantize.options import Quantize
from distill.quantize.rounding import fitted
from distill.tutorial.bundled import bundled

Inputs = Callable[[int], tuple]
"""seed -> the arguments of a net's call"""
PROMPTS = [
    "a small red circle", "two blue squares", "a green star", "a yellow ring",
    "a small red ring on a blue background, top left", "a large yellow star on a pink background",
    "a small green heart on a black background, bottom right", "a large blue circle on a white background",
]  # fmt: skip
ENDS = ("conv_in", "conv_out")
SMALL = {"sample_size": 16, "norm_num_groups": 16, "layers_per_block": 1}
SDXL = {
    "block_out_channels": (64, 128, 128), "attention_head_dim": (2, 4, 4), "cross_attention_dim": 256,
    "transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SD15 = {"block_out_channels": (64, 128, 128, 128), "attention_head_dim": 8, "cross_attention_dim": 192}


@dataclass(frozen=True)
class Options:
    seeds: int = 3
    """nets, or inputs, of each kind"""
    train_steps: int = 300
    """of the transformer"""


def random_unet(config: dict, seed: int) -> tuple[nn.Module, Inputs]:
    """A small diffusers U-Net of Gaussian weights, variance 1 / fan-in."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)  # of the biases
    net, g = UNet2DConditionModel(**SMALL, **config).eval(), torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.ndim > 1:
            p.data.normal_(generator=g).div_(p[0].numel() ** 0.5)

    def inputs(seed: int) -> tuple:
        g = torch.Generator().manual_seed(seed)
        words = torch.randn(4, 77, config["cross_attention_dim"], generator=g)
        return torch.randn(4, 4, 16, 16, generator=g), torch.tensor([800, 500, 200, 50]), words

    return net, inputs


class Transformer(nn.Module):
    """Two layers over 32 letters of an alphabet of 64."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(64, 128), nn.Parameter(torch.zeros(32, 128))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 512, 0.0, "gelu", True) for _ in range(2))
        self.head = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 32) letters -> (B, 32, 64) logits."""
        h = self.embed(x) + self.place
        for layer in self.layers:
            h = h + layer.linear2(F.gelu(layer.linear1(layer.norm1(h + layer.self_attn(h, h, h)[0]))))
        return self.head(h)


def trained_transformer(steps: int, seed: int) -> tuple[nn.Module, Inputs]:
    """It learns to say a sequence backwards."""

    def inputs(seed: int) -> tuple:
        return (torch.randint(0, 64, (64, 32), generator=torch.Generator().manual_seed(seed)),)

    torch.manual_seed(seed)
    net = Transformer()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    with torch.enable_grad():
        for step in range(steps):
            (x,) = inputs(1000 + step)
            optimizer.zero_grad()
            F.cross_entropy(net(x).flatten(0, 1), x.flip(1).flatten()).backward()
            optimizer.step()
    return net.eval(), inputs


def bundled_net(name: str) -> tuple[nn.Module, Inputs]:
    """The U-Net of a bundled model: a student at its one time, a teacher halfway."""
    model = load(bundled(name))
    channels, size = model.net.config.in_channels, model.net.config.sample_size

    def inputs(seed: int) -> tuple:
        g = torch.Generator().manual_seed(seed)
        cond = model.encode(PROMPTS * 4)
        more = [cond[k] for k in ("encoder_hidden_states", "class_labels") if k in cond]
        x = torch.randn(4 * len(PROMPTS), channels, size, size, generator=g)
        return x, torch.full((len(x),), 500 if name == "teacher" else int(model.meta.t_in)), *more

    return model.net, inputs


def chosen(net: nn.Module) -> dict[str, nn.Module]:
    """The layers that every column rounds."""
    kinds = (nn.Linear, nn.Conv2d)
    return {
        n: m for n, m in net.named_modules()
        if type(m) in kinds and n.split(".")[0] not in ENDS and group_for(m.weight.shape[1], 64)
    }  # fmt: skip


def rounded(net: nn.Module, rounding: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy with the weights of the chosen layers rounded."""
    made = copy.deepcopy(net)
    for layer in chosen(made).values():
        layer.weight.data = rounding(layer.weight.data)
    return made


def affine(w: Tensor) -> Tensor:
    """w with a scale and a zero for 64 numbers."""
    return fitted(w, 4, group_for(w.shape[1], 64), None).dequantize()


def q4_0(w: Tensor) -> Tensor:
    """w as ggml rounds it."""
    return from_q4_0(to_q4_0(w), w.shape)


def packed(net: nn.Module, run: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """A copy as the default packs it, calibrated by `run`, computing in floats."""
    names, made = chosen(net), copy.deepcopy(net)
    quantize_(made, Quantize(), run and (lambda: run(made)), lambda name, _: name in names)
    for module in made.modules():
        if hasattr(module, "activations"):
            module.activations = "float"
    return made


def errors(net: nn.Module, inputs: Inputs, seed: int) -> dict[str, float]:
    """Each column's error, mean over outputs that calibration never saw."""

    def out(net: nn.Module, seed: int) -> Tensor:
        y = net(*inputs(seed))
        return getattr(y, "sample", y).flatten(1)

    exact = out(net, seed)
    nets = {"affine": rounded(net, affine), "Q4_0": rounded(net, q4_0), "default": packed(net)}
    nets["run"] = packed(net, lambda made: [out(made, 100 + i) for i in range(4)])
    return {k: ((out(some, seed) - exact).norm(dim=1) / exact.norm(dim=1)).mean().item() for k, some in nets.items()}


@torch.no_grad()
def main(o: Options) -> None:
    """Print the table."""
    kinds: dict[str, Callable[[int], tuple[nn.Module, Inputs]]] = {
        "random, SD1.5's blocks": lambda seed: random_unet(SD15, seed),
        "random, SDXL's blocks": lambda seed: random_unet(SDXL, seed),
        "transformer, trained": lambda seed: trained_transformer(o.train_steps, seed),
        "bundled student": lambda seed: bundled_net("student"),
        "bundled teacher": lambda seed: bundled_net("teacher"),
    }
    print("| net | affine | Q4_0 | default | run |\n|---|---|---|---|---|")
    for name, make in kinds.items():
        found = [errors(*make(seed), seed) for seed in range(o.seeds)]
        mean = {c: statistics.mean(f[c] for f in found) for c in found[0]}
        cells = [f"{mean['Q4_0']:.4f}" if c == "Q4_0" else with_ratio(mean, found, c) for c in mean]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def with_ratio(mean: dict[str, float], found: list[dict[str, float]], column: str) -> str:
    """Its error, over Q4_0's, and the ratio's range over seeds."""
    each = [f[column] / f["Q4_0"] for f in found]
    return f"{mean[column]:.4f}, {mean[column] / mean['Q4_0']:.2f} ({min(each):.2f} to {max(each):.2f})"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
