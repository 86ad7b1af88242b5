"""Time, memory, file size and error of a 4-bit SD1.5-size U-Net on the CPU, beside fp32.

    python benchmarks/four_bit_speed.py [--threads 1 2] [--runs 7] [--size 32] [--work DIR]

Random weights, one image. Writes docs/four_bit_speed.json and .md. Forwards are timed in turn in one process, so that
whatever else the machine does meets all alike: a ratio is of two forwards of one turn, and quartiles over the turns
are told. Memory is that of a process of its own, at one thread. What is measured is kept in --work: the same command
goes on where it was stopped, and measures nothing twice.

    fp32           torch's own layers
    fp32, oneDNN   the same with linear layers through oneDNN where W4A16's go there: what the others are divided by
    W4A16, W4A8    ours, with activations "float" and "auto"
    Q4_0, W4A8     plain Q4_0 as a GGUF's reader holds it, "auto"
    per call       Q4_0 blocks, dequantized to fp32 by torch operations in each call, as ComfyUI-GGUF does
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
parser.add_argument("--runs", type=int, default=7, help="timed forwards of each")
parser.add_argument("--size", type=int, default=32, help="side of the latent: an eighth of the picture's")
parser.add_argument("--work", type=Path, default=ROOT / "runs/four_bit_speed", help="6 GB of files, kept")
parser.add_argument("--out", type=Path, default=ROOT / "docs/four_bit_speed")
parser.add_argument("--part", choices=["files", "memory", "times"], help=argparse.SUPPRESS)
parser.add_argument("--variant", default="fp32", help=argparse.SUPPRESS)
options = parser.parse_args()

import torch  # noqa: E402
from four_bit_layers import PerCall, to_q4_0  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from distill.packed import cpu, layers, verify  # noqa: E402
from distill.packed.formats import ggml, regroup  # noqa: E402
from distill.packed.weight import group_for  # noqa: E402
from distill.quantize.rounding import round_to_nearest  # noqa: E402

BASE = "fp32, oneDNN"
FILES = {"fp32": "fp32", BASE: "fp32", "W4A16": "W4", "W4A8": "W4", "Q4_0, W4A8": "Q4_0", "per call": "per call"}
"""variant -> its file"""
DENSE = ("conv_in", "conv_out")
SDXL = dict(
    cross_attention_dim=2048, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
# ----------------------------------------------------------------------------------------------------- the network


def unet(device: str = "meta", **config) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        return UNet2DConditionModel(**{"cross_attention_dim": 768, "sample_size": 64} | config).eval()


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n not in DENSE}


def write_files() -> None:
    """The same random weights as fp32, as our 4 bits (groups of 64, plain rounding) and as Q4_0, held in two ways."""
    torch.manual_seed(0)
    model = unet("cpu")
    dense = model.state_dict()
    ours, held, blocks = dict(dense), dict(dense), dict(dense)
    for name in quantizable(model):
        w, key = dense[f"{name}.weight"], f"{name}.weight"
        del ours[key], held[key]
        ours |= round_to_nearest(w, 4, group_for(w.shape[1], 64)).to_tensors(name)
        blocks[key] = to_q4_0(w)
        held |= regroup.entries(key, tuple(w.shape), ggml.q4_0(blocks[key]), regroup.Told())
    for name, tensors in (("fp32", dense), ("W4", ours), ("Q4_0", held), ("per call", blocks)):
        save_file(tensors, options.work / f"{name}.safetensors")
    small = {k: t.half() if t.is_floating_point() else t for k, t in ours.items()}
    save_file(small, options.work / "W4 as shared.safetensors")


class OneDNN(nn.Linear):
    """A dense layer multiplied by what W4A16 multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        multiply = next(iter(cpu.multipliers().values()))
        return multiply(x, self.weight, self.bias)


def load(variant: str) -> nn.Module:
    model = unet()
    tensors = load_file(options.work / f"{FILES[variant]}.safetensors")
    if variant == BASE:
        for module in model.modules():
            module.__class__ = OneDNN if type(module) is nn.Linear else module.__class__
    elif variant == "per call":
        for name, module in quantizable(model).items():
            parent, _, child = name.rpartition(".")
            new = PerCall(module, tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None))
            setattr(model.get_submodule(parent), child, new)
    elif variant != "fp32":
        tensors = layers.install(model, tensors)
        for module in model.modules():
            if isinstance(module, layers.QuantizedLayer):
                module.activations = "float" if variant == "W4A16" else "auto"
    model.load_state_dict(tensors, strict=False, assign=True)
    return model


def forward(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, words = torch.randn(1, 4, options.size, options.size, generator=g), torch.randn(1, 77, 768, generator=g)
    return model(x, torch.tensor([500]), words).sample


def measure_memory(variant: str) -> dict:
    """MB of this process: before loading, with every weight read, and at most during a first and second forward."""
    import diffusers.models.unets.unet_2d_condition  # noqa: F401

    before = memory("VmRSS")
    model = load(variant)
    read = sum(t.view(torch.uint8).flatten()[::1024].sum().item() for t in model.state_dict().values() if t.numel() > 1)
    read += sum(m.blocks.flatten()[::1024].sum().item() for m in model.modules() if isinstance(m, PerCall))
    resident = memory("VmRSS")
    forward(model), forward(model)
    return {"before": before, "resident": resident, "peak": memory("VmHWM"), "read": read > 0}


def memory(what: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def measure_times() -> dict:
    """variant -> seconds (median), ratio to BASE (lower quartile, median, upper), error."""
    models = {v: load(v) for v in FILES}
    outputs, taken = {}, {v: [] for v in FILES}
    # at one thread the process's own seconds, which others on the machine do not lengthen
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in range(-1, options.runs):
        for v, model in models.items():
            start = clock()
            outputs[v] = forward(model)
            taken[v] += [clock() - start] * (run >= 0)  # not the first
    exact = outputs["fp32"]
    return {
        v: {
            "seconds": statistics.median(taken[v]),
            "ratio": quartiles([t / d for t, d in zip(taken[v], taken[BASE])]),
            "error": ((outputs[v] - exact).norm() / exact.norm()).item(),
        }
        for v in FILES
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


# --------------------------------------------------------------------------------------------------------- tables


def file_share(**config) -> float:
    """Bytes of a 4-bit file over those of an fp16 file, by arithmetic."""
    model = unet(**config)
    dense = small = sum(2 * p.numel() for p in model.parameters())
    for module in quantizable(model).values():
        numbers, group = module.weight.numel(), group_for(module.weight.shape[1], 64)
        small += numbers // 2 + 2 * 2 * numbers // group - 2 * numbers + 120  # the mark
    return small / dense


def part(name: str, variant: str = "fp32", threads: int = 1) -> dict:
    """What a process of its own finds, or found before."""
    told = {"part": name, "variant": variant, "threads": threads, "size": options.size, "runs": options.runs}
    kept = options.work / f"{' '.join(map(str, told.values()))}.json"
    if not kept.exists():
        given = [str(word) for key, value in told.items() for word in (f"--{key}", value)]
        command = [sys.executable, __file__, *given, "--work", str(options.work)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed ({done.returncode}).")
        kept.write_text(done.stdout.splitlines()[-1])
    return json.loads(kept.read_text())


def processor() -> dict:
    """What decides how fast it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16")
    return {
        "name": found.get("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "torch sees": torch.backends.cpu.get_cpu_capability(),
        "flags": [f for f in wanted if f in found.get("flags", "").split()],
        "int8 is used": verify.integers_are_fast(),
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(ratio: list[float]) -> str:
    return f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"


def report(r: dict) -> str:
    """The page: a row for each variant."""
    c = r["cpu"]
    how = f"--threads {' '.join(map(str, r['times']))} --runs {r['runs']} --size {r['size']}"
    text = f"# 4 bits on the CPU: time, memory, error\n\nMade by `python benchmarks/four_bit_speed.py {how}`: SD1.5's "
    text += f"U-Net with random weights, one image; {c['name']}, {c['cores']} cores ({', '.join(c['flags'])}), torch "
    text += f"{r['torch']}. Forwards in turn, {r['runs']} of each: median (quartiles) of their time over that of "
    text += f"*{BASE}* in the same turn. Memory without the libraries.\n\n"
    heads = [f"{n} thread{'s' * (n > 1)}: time / {BASE}" for n in r["times"]]
    base = {k: r["memory"][BASE][k] - r["memory"][BASE]["before"] for k in ("resident", "peak")}
    rows = []
    for v, m in r["memory"].items():
        times = [t[v] for t in r["times"].values()]
        share = [f"{(m[k] - m['before']) / base[k]:.2f}" for k in ("resident", "peak")]
        rows.append([v, *(spread(t["ratio"]) for t in times), *share, f"{times[0]['error']:.3f}"])
    text += table(["", *heads, "resident / fp32", "peak / fp32", "error"], rows)
    text += f"\nFile at 4 bits in groups of 64, over fp16: SD1.5 {r['files']['sd15']:.3f} (written), "
    text += f"SDXL {r['files']['sdxl']:.3f} (arithmetic).\n"
    return text + layer_by_layer(json.loads((ROOT / "docs/four_bit_layers.json").read_text()))


def layer_by_layer(r: dict) -> str:
    """What benchmarks/four_bit_layers.py found, milliseconds."""
    ways = list(next(iter(r["layers"].values()))["ms"])
    text = "\n## Layer by layer, milliseconds\n\nMade by `python benchmarks/four_bit_layers.py` at "
    text += f"{r['machine']}, torch {r['torch']}; *fp32* is torch's own layer.\n\n"
    rows = []
    for name, layer in r["layers"].items():
        ms = [layer["ms"][w] for w in ways]
        rows.append([name, str(layer["count"]), *("-" if t is None else f"{t:.1f}" for t in ms)])
    return text + table(["layer", "times in SD1.5", *ways], rows)


def main() -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    part("files")
    result = {"runs": options.runs, "size": options.size, "torch": torch.__version__, "cpu": processor()}
    result["memory"] = {v: part("memory", v) for v in FILES}
    result["times"] = {threads: part("times", threads=threads) for threads in options.threads}
    fp16 = sum(2 * p.numel() for p in unet().parameters())
    written = (options.work / "W4 as shared.safetensors").stat().st_size
    result["files"] = {"sd15": written / fp16, "sd15 by arithmetic": file_share(), "sdxl": file_share(**SDXL)}
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    torch.set_num_threads(options.threads[0])
    with torch.no_grad():
        if options.part == "files":
            write_files()
            print("{}")
        elif options.part:
            made = {"memory": lambda: measure_memory(options.variant), "times": measure_times}
            print(json.dumps(made[options.part]()))
        else:
            main()
