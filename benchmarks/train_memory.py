"""Peak memory of two training steps of a Stable Diffusion 1.5 of random weights, student and coach both LoRA.

    python benchmarks/train_memory.py [--side 64] [--rank 64]

On the CPU in fp32, one picture at once, with gradient checkpointing. Prints the weights' bytes, and the process's peak
above what it took before the nets were made.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch
import tyro

from distill.denoiser import diffusers_net, from_net
from distill.methods.base import Parts
from distill.methods.vsd import VSDOptions
from distill.schedule import ddpm, randn
from distill.student import Student, StudentOptions
from distill.training.loop import seeded, train
from distill.training.options import TrainOptions


@dataclass(frozen=True)
class Options:
    side: int = 64
    """Of the latents; 64 is a picture of 512 pixels."""
    rank: int = 64
    """Of both LoRAs."""
    steps: int = 2


def peak() -> float:
    """GiB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(o: Options) -> None:
    from diffusers import UNet2DConditionModel

    before = peak()
    net = UNet2DConditionModel(cross_attention_dim=768).requires_grad_(False)
    net.enable_gradient_checkpointing()
    weights = sum(p.nbytes for p in net.parameters()) / 2**30
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.0f} M weights, {weights:.1f} GiB", flush=True)

    def make(unet: torch.nn.Module) -> object:
        return from_net(diffusers_net(unet), ddpm(), "eps")

    def batches(step: int, g: torch.Generator) -> dict:
        return {"cond": {"encoder_hidden_states": randn((1, 77, 768), g)}, "shape": (1, 4, o.side, o.side)}

    g, form = seeded("cpu", 0), StudentOptions(student="lora", student_rank=o.rank)
    student = Student(form.grow(net, None, None, g), make)
    null = {"encoder_hidden_states": torch.zeros(1, 77, 768)}
    options = VSDOptions(rank=o.rank, lr=1e-6, coach_lr=1e-6)
    method = options.build(Parts(net, make, student, null, None, g))
    start = time.perf_counter()
    for step in train(method, batches, TrainOptions(steps=o.steps, max_spread=1e9), device="cpu"):
        spent = time.perf_counter() - start
        print(f"step {step.step}: peak {peak() - before:.1f} GiB, {spent:.0f} s, rel_gap {step.logs['rel_gap']:.2g}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
