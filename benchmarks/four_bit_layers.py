"""4-bit layers of SD1.5's shapes on the CPU: ours, bitsandbytes, sdnq, and dequantizing in each call.

    python benchmarks/four_bit_layers.py [--threads 1] [--runs 5]

Prints JSON: for each layer the median milliseconds and the error of each way, taken in turn. bitsandbytes and sdnq are
no requirement of ours; without them their columns stay empty, which is said. `four_bit_speed.py --python` runs this.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from distill.packed import layers  # noqa: E402
from distill.packed.weight import group_for  # noqa: E402
from distill.quantize.rounding import round_to_nearest  # noqa: E402

LAYERS = [  # SD1.5's, with how often they occur: x, N, kernel (0: Linear)
    ((1, 4096, 320), 320, 0, 45), ((1, 4096, 320), 2560, 0, 5), ((1, 4096, 1280), 320, 0, 5),
    ((1, 1024, 640), 640, 0, 45), ((1, 1024, 640), 5120, 0, 5), ((1, 256, 1280), 1280, 0, 45),
    ((1, 256, 1280), 10240, 0, 5), ((1, 77, 768), 1280, 0, 12), ((1, 1280), 1280, 0, 12),
    ((1, 320, 64, 64), 320, 3, 11), ((1, 640, 32, 32), 640, 3, 10), ((1, 1280, 16, 16), 1280, 3, 9),
    ((1, 2560, 16, 16), 1280, 3, 2), ((1, 1280, 8, 8), 1280, 3, 11), ((1, 960, 64, 64), 320, 1, 1),
]  # fmt: skip


# ------------------------------------------------------------------------------- Q4_0, dequantized in every call


def to_q4_0(weight: Tensor) -> Tensor:
    """(..., 32 numbers) -> (blocks, 18) bytes: an fp16 scale, then 16 bytes: number i low, number i + 16 high."""
    w = weight.reshape(-1, 32)
    top = w.gather(1, w.abs().argmax(1, keepdim=True))
    d = (top / -8).half()
    q = (w / d.float().where(d != 0, 1) + 8.5).clamp_(0, 15).to(torch.uint8)
    return torch.cat([d.view(torch.uint8), q[:, :16] | q[:, 16:] << 4], 1)


def from_q4_0(blocks: Tensor, shape: torch.Size) -> Tensor:
    d = blocks[:, :2].contiguous().view(torch.float16)
    q = blocks[:, 2:].reshape(-1, 1, 16) >> torch.tensor([0, 4], dtype=torch.uint8).view(1, 2, 1)
    q = (q & 15).reshape(-1, 32).to(torch.int8) - 8
    return (d * q).reshape(shape).to(torch.float32)


class PerCall(nn.Module):
    def __init__(self, module: nn.Module, blocks: Tensor, bias: Tensor | None):
        super().__init__()
        self.shape, self.blocks, self.bias = module.weight.shape, blocks, bias
        self.geometry = (module.stride, module.padding) if isinstance(module, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        w = from_q4_0(self.blocks, self.shape)
        return F.conv2d(x, w, self.bias, *self.geometry) if self.geometry else F.linear(x, w, self.bias)


# ----------------------------------------------------------------------------------------------- layer by layer


def measure_layers(runs: int) -> dict:
    """For each layer of LAYERS: milliseconds of each way, in turn; None where a library does not take the layer."""
    found = {}
    for shape, n, kernel, count in LAYERS:
        torch.manual_seed(0)
        x = torch.randn(shape)
        c = shape[1] if kernel else shape[-1]
        dense = nn.Conv2d(c, n, kernel, padding=kernel // 2) if kernel else nn.Linear(c, n)
        ways = {"fp32": dense, "W4A16": ours(dense, "float"), "W4A8": ours(dense, "auto")}
        ways["per call"] = PerCall(dense, to_q4_0(dense.weight), dense.bias)
        ways["bitsandbytes NF4"] = bitsandbytes_nf4(dense)
        ways |= {"sdnq uint4": sdnq_uint4(dense), "sdnq uint4, int8": sdnq_uint4(dense, True)}
        taken, errors, exact = {w: [] for w in ways}, {}, dense(x)
        for run in range(-2, 2 * runs):
            for name, way in ways.items():
                if way is None:
                    continue
                start = time.perf_counter()
                y = way(x)
                if run >= 0:
                    taken[name].append(time.perf_counter() - start)
                errors[name] = ((y - exact).norm() / exact.norm()).item()
        key = f"{kernel}x{kernel} conv {c}->{n}, {shape[2]}x{shape[3]}" if kernel else f"linear {c}->{n}, "
        key += "" if kernel else f"{x[..., 0].numel()} rows"
        times = {w: 1e3 * statistics.median(t) if t else None for w, t in taken.items()}
        found[key] = {"count": count, "ms": times, "errors": errors}
    return found


def ours(dense: nn.Module, activations: str) -> nn.Module:
    holder = nn.ModuleDict({"layer": dense})
    w = round_to_nearest(dense.weight.data, 4, group_for(dense.weight.shape[1], 64))
    layers.install(holder, w.to_tensors("layer") | {"layer.bias": dense.bias.data})
    holder["layer"].activations = activations
    return holder["layer"]


def bitsandbytes_nf4(dense: nn.Module) -> nn.Module | None:
    try:
        import bitsandbytes
    except ImportError:
        return missing("bitsandbytes")
    if not isinstance(dense, nn.Linear):
        return None  # it has no convolution
    layer = bitsandbytes.nn.Linear4bit(*dense.weight.shape[::-1], quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


def sdnq_uint4(dense: nn.Module, integers: bool = False) -> nn.Module | None:
    try:
        from sdnq import sdnq_post_load_quant
    except ImportError:
        return missing("sdnq")
    made = sdnq_post_load_quant(
        nn.Sequential(copy.deepcopy(dense)), weights_dtype="uint4", group_size=64, quant_conv=True,
        use_quantized_matmul=integers, use_quantized_matmul_conv=integers, torch_dtype=torch.float32,
    )  # fmt: skip
    return made[0]


_said = set()


def missing(name: str) -> None:
    if name not in _said:
        print(f"{name} IS NOT INSTALLED in {sys.executable}: its column stays empty. See --python.", file=sys.stderr)
    _said.add(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="half of the timed runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        print(json.dumps(measure_layers(options.runs)))


if __name__ == "__main__":
    main()
