"""What the training loop costs beside the passes that a step of VSD needs: their times alone, and a whole step's.

    python benchmarks/train_step.py [MODEL] [--student lora] [--coach lora] [--batch 8] [--runs 15] [--threads 1]

MODEL is a file or folder, by default the bundled teacher; small-sdxl is SDXL's architecture at a tenth of its width, of
random weights. Passes, each of the net alone: the student forwards and
backwards; the guided teacher (a doubled batch) and the coach forwards; the coach forwards and backwards. A step has
losses, clipping, two optimisers, the average and the readouts on top. All are timed in turn, in one process; medians in
milliseconds as JSON, and of the ratios of a step to the sum of the passes after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from distill.backbones import load
from distill.backbones.base import Backbone
from distill.backbones.own import Own
from distill.denoiser import map_cond
from distill.methods.vsd import VSDOptions
from distill.schedule import ddpm
from distill.student import StudentOptions
from distill.training.batches import prompt_batches
from distill.training.loop import train
from distill.training.options import TrainOptions
from distill.training.students import assemble
from distill.tutorial.bundled import find


def passes(model, method, batch: int) -> dict[str, Callable[[], None]]:
    """The forward and backward passes of a step, by name."""
    cond = model.encode(["a red ring"] * batch)
    twice = map_cond(lambda c: torch.cat([c, c]), cond)
    x, t = torch.randn(model.shape(batch), device=model.device), torch.full((batch,), 0.5, device=model.device)
    two, late = torch.cat([x, x]), torch.cat([t, t])

    def learn(denoiser, net) -> Callable[[], None]:
        def call() -> None:
            denoiser(x, t, cond).square().mean().backward()
            for p in net.parameters():
                p.grad = None

        return call

    @torch.no_grad()
    def look(denoiser, x, t, cond) -> None:
        denoiser(x, t, cond)

    return {
        "student, both ways": learn(method.student.denoiser, method.student),
        "teacher, guided": lambda: look(method.teacher, two, late, twice),
        "coach": lambda: look(method.coach.denoiser, x, t, cond),
        "coach, both ways": learn(method.coach.denoiser, method.coach),
    }


class SmallSDXL(torch.nn.Module):
    """SDXL's U-Net in small, called as one's own network is."""

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 128), attention_head_dim=(2, 4, 8), cross_attention_dim=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 4), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=32, projection_class_embeddings_input_dim=6 * 32 + 64,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, index: torch.Tensor, cond: dict) -> torch.Tensor:
        """(B, 4, h, w), (B,) and {"words": (B, 77, 128), "pooled": (B, 64)} -> a prediction of the noise."""
        added = {"text_embeds": cond["pooled"], "time_ids": x.new_ones(len(x), 6)}
        return self.unet(x, index, cond["words"], added_cond_kwargs=added, return_dict=False)[0]


def opened(name: str) -> Backbone:
    """The model of the command line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "small-sdxl":
        return load(find(name), device)

    def encode(prompts: list[str]) -> dict:
        return {name: v.expand(len(prompts), *v.shape[1:]) for name, v in one.items()}

    torch.manual_seed(0)
    one = {"words": torch.randn(1, 77, 128, device=device), "pooled": torch.randn(1, 64, device=device)}
    return Own(SmallSDXL(), (4, 32, 32), "eps", ddpm(), null=one, encode=encode, device=device)


def measure(name: str, student: str, coach: str, batch: int, runs: int) -> dict:
    """Medians over `runs`, the first three left out."""
    model = opened(name)
    training, form = TrainOptions(steps=10**6, max_spread=1e6), StudentOptions(student=student, student_rank=8)
    options = VSDOptions(coach=coach, rank=8, guidance=2.0, lr=1e-6, coach_lr=1e-6)
    method = assemble(model, options, training, form)
    steps = train(method, prompt_batches(model, ["a red ring"], batch), training, device=model.device)
    work = {"step": lambda: next(steps), **passes(model, method, batch)}
    times: dict[str, list[float]] = {what: [] for what in work}
    for _ in range(runs + 3):
        for what, do in work.items():
            start = time.perf_counter()
            do()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times[what].append(1000 * (time.perf_counter() - start))
    ms = {what: statistics.median(seen[3:]) for what, seen in times.items()}
    needed = zip(*(seen[3:] for what, seen in times.items() if what != "step"))
    ratio = statistics.median(step / sum(parts) for step, parts in zip(times["step"][3:], needed))
    told = {"model": model.name, "student": student, "coach": coach, "batch": batch}
    told |= {"threads": torch.get_num_threads(), "device": str(model.device)}
    return told | {"ms": {what: round(v, 1) for what, v in ms.items()}, "ratio": round(ratio, 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="teacher")
    parser.add_argument("--student", choices=["full", "lora"], default="full")
    parser.add_argument("--coach", choices=["lora", "copy"], default="lora")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.model, options.student, options.coach, options.batch, options.runs), indent=1))
