"""Time, memory, file size and error of a 4-bit SD1.5-size U-Net on the CPU, beside fp32 and beside other libraries.

    python benchmarks/four_bit_speed.py [--threads 1] [--runs 5] [--python VENV/bin/python] [--work DIR]

Random weights, 64x64 latents, one image. Writes docs/four_bit_speed.md and .json. Times of a forward are taken in turn
in one process, so that whatever else the machine does meets all alike; memory is that of a process of its own.
bitsandbytes and sdnq are compared layer by layer, in the Python given with --python (they are no requirement of ours:
`python -m venv V && V/bin/pip install torch bitsandbytes sdnq`). "per call" is what ComfyUI-GGUF does: Q4_0 blocks,
dequantized to fp32 by torch operations in each call.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--runs", type=int, default=5, help="timed runs of each; medians are reported")
parser.add_argument("--python", default=sys.executable, help="one that has torch, bitsandbytes and sdnq")
parser.add_argument("--work", type=Path, default=Path("/tmp/four_bit_speed"), help="5 GB of files, kept")
parser.add_argument("--out", type=Path, default=ROOT / "docs/four_bit_speed")
parser.add_argument("--part", choices=["files", "memory", "times"], help=argparse.SUPPRESS)
parser.add_argument("--variant", default="fp32", help=argparse.SUPPRESS)
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)

import torch  # noqa: E402
from four_bit_layers import PerCall, to_q4_0  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from distill.packed import layers  # noqa: E402
from distill.packed.weight import group_for  # noqa: E402
from distill.quantize.rounding import round_to_nearest  # noqa: E402

VARIANTS = ["fp32", "W4A16", "W4A8", "per call"]
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
    """The same random weights as fp32, as our 4 bits (groups of 64, plain rounding) and as Q4_0."""
    torch.manual_seed(0)
    model = unet("cpu")
    dense = model.state_dict()
    ours, gguf = dict(dense), dict(dense)
    for name in quantizable(model):
        w = ours.pop(f"{name}.weight")
        ours |= round_to_nearest(w, 4, group_for(w.shape[1], 64)).to_tensors(name)
        gguf[f"{name}.weight"] = to_q4_0(w)
    options.work.mkdir(parents=True, exist_ok=True)
    for name, tensors in (("fp32", dense), ("W4", ours), ("per call", gguf)):
        save_file(tensors, options.work / f"{name}.safetensors")
    small = {k: t.half() if t.is_floating_point() else t for k, t in ours.items()}
    save_file(small, options.work / "W4 as shared.safetensors")
    options.work.joinpath("done").touch()


def load(variant: str) -> nn.Module:
    model = unet()
    tensors = load_file(options.work / f"{'W4' if variant.startswith('W4') else variant}.safetensors")
    if variant.startswith("W4"):
        tensors = layers.install(model, tensors)
        for module in model.modules():
            if isinstance(module, layers.QuantizedLayer):
                module.activations = "float" if variant == "W4A16" else "auto"
    elif variant == "per call":
        for name, module in quantizable(model).items():
            parent, _, child = name.rpartition(".")
            new = PerCall(module, tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None))
            setattr(model.get_submodule(parent), child, new)
    model.load_state_dict(tensors, strict=False, assign=True)
    return model


def forward(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, words = torch.randn(1, 4, 64, 64, generator=g), torch.randn(1, 77, 768, generator=g)
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
    models = {v: load(v) for v in VARIANTS}
    first, outputs, taken = {}, {}, {v: [] for v in VARIANTS}
    for run in range(-1, options.runs):
        for v, model in models.items():
            start = time.perf_counter()
            outputs[v] = forward(model)
            first.setdefault(v, time.perf_counter() - start)
            if run >= 0:
                taken[v].append(time.perf_counter() - start)
    exact = outputs["fp32"]
    ratios = {v: statistics.median(t / d for t, d in zip(taken[v], taken["fp32"])) for v in VARIANTS}
    return {
        v: {
            "seconds": statistics.median(taken[v]),
            "ratio": ratios[v],
            "first": first[v],
            "error": ((outputs[v] - exact).norm() / exact.norm()).item(),
        }
        for v in VARIANTS
    }


# --------------------------------------------------------------------------------------------------------- tables


def file_share(**config) -> float:
    """Bytes of a 4-bit file over those of an fp16 file, by arithmetic."""
    model = unet(**config)
    dense = small = sum(2 * p.numel() for p in model.parameters())
    for module in quantizable(model).values():
        numbers, group = module.weight.numel(), group_for(module.weight.shape[1], 64)
        small += numbers // 2 + 2 * 2 * numbers // group - 2 * numbers + 120  # the mark
    return small / dense


def common() -> list[str]:
    return ["--threads", str(options.threads), "--runs", str(options.runs)]


def part(name: str, variant: str = "fp32") -> dict:
    work = ["--work", str(options.work), "--part", name, "--variant", variant]
    return run([sys.executable, __file__, *common(), *work])


def run(command: list[str]) -> dict:
    """The JSON that a process prints last."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed ({done.returncode}).")
    return json.loads(done.stdout.splitlines()[-1])


def per_forward(found: dict, way: str, over: list[str]) -> float:
    """Seconds of all layers `over`, each as often as it occurs, in one way."""
    return sum(found[k]["ms"][way] * found[k]["count"] for k in over) / 1e3


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(r: dict) -> str:
    fp32 = r["memory"]["fp32"]
    own = {v: (m["resident"] - m["before"], m["peak"] - m["before"]) for v, m in r["memory"].items()}
    rows = [
        [
            v, number(r["times"][v]["ratio"]), number(r["times"][v]["seconds"], ".1f"),
            number(r["times"][v]["first"], ".1f"), number(r["times"][v]["error"], ".3f"),
            f"{m['resident']:.0f} MB", number(m["resident"] / fp32["resident"]), number(own[v][0] / own["fp32"][0]),
            f"{m['peak']:.0f} MB", number(m["peak"] / fp32["peak"]), number(own[v][1] / own["fp32"][1]),
        ]
        for v, m in r["memory"].items()
    ]  # fmt: skip
    head = ["", "time / fp32", "seconds", "first call", "error", "resident", "/ fp32", "without libraries"]
    text = "# 4 bits on the CPU: time, memory, error\n\n"
    text += (
        f"Made by `python benchmarks/four_bit_speed.py --threads {r['threads']}`: SD1.5's U-Net with random weights, "
    )
    text += f"64x64 latents, one image, {r['machine']}, torch {r['torch']}. Times in turn in one process, medians of "
    text += f'{r["runs"]}. Memory of a process of its own; "without libraries" is less what it had before loading.\n\n'
    text += table([*head, "peak", "/ fp32", "without libraries"], rows)
    text += f"\nFile at 4 bits in groups of 64, over fp16: SD1.5 {r['files']['sd15']:.3f} (written), "
    text += f"SDXL {r['files']['sdxl']:.3f} (arithmetic).\n\n## Layer by layer, milliseconds\n\n"
    ways = list(next(iter(r["layers"].values()))["ms"])
    rows = [[k, str(v["count"]), *(number(v["ms"][w], ".1f") for w in ways)] for k, v in r["layers"].items()]
    for words, keys in (
        ("all, as often as they occur, s", list(r["layers"])),
        ("linear ones, s", [k for k in r["layers"] if k.startswith("linear")]),
    ):
        whole = [w if all(r["layers"][k]["ms"][w] is not None for k in keys) else None for w in ways]
        rows.append([words, "", *(number(w and per_forward(r["layers"], w, keys)) for w in whole)])
    return text + table(["layer", "times", *ways], rows)


def main() -> None:
    if not (options.work / "done").exists():
        part("files")
    result = {"threads": options.threads, "runs": options.runs, "torch": torch.__version__, "machine": processor()}
    result["memory"] = {v: part("memory", v) for v in VARIANTS}
    result["times"] = part("times")
    result["layers"] = run([options.python, str(ROOT / "benchmarks/four_bit_layers.py"), *common()])
    fp16 = sum(2 * p.numel() for p in unet().parameters())
    written = (options.work / "W4 as shared.safetensors").stat().st_size
    result["files"] = {"sd15": written / fp16, "sd15 by arithmetic": file_share(), "sdxl": file_share(**SDXL)}
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(report(result))
    print(report(result))


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{options.threads} thread{'s' * (options.threads > 1)} of {names[0] if names else 'a CPU'}"


if __name__ == "__main__":
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        if options.part == "files":
            write_files()
            print("{}")
        elif options.part:
            made = {"memory": lambda: measure_memory(options.variant), "times": measure_times}
            print(json.dumps(made[options.part]()))
        else:
            main()
