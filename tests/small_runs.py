"""Small runs of the training loop, for test_train.py and test_resume.py."""

import gc
from pathlib import Path

import torch
from torch import nn

from distill import schedule as S
from distill.denoiser import from_net
from distill.methods.base import Parts
from distill.methods.regression import RegressionOptions
from distill.methods.sds import SDSOptions
from distill.methods.vsd import VSDOptions
from distill.student import Student, StudentOptions
from distill.toy import MLP
from distill.training import store
from distill.training.loop import train
from distill.training.options import TrainOptions

SCHEDULE = S.flow()
TINY = TrainOptions(steps=12, save_every=4, log_every=3, accumulate=2, seed=7)


class Net(nn.Module):
    """An MLP with a prompt of two numbers."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP(4, 16, generator=torch.Generator().manual_seed(0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, index, cond):
        return self.mlp(torch.cat([x, cond["c"]], 1), index)[:, :2]


def make(net):
    return from_net(net, SCHEDULE, "x0")


def build(kind, seed=1, **changes):
    """The method, always the same but for `changes` to its options; "two loras": student and coach on one net; "two
    steps": a student of two calls."""
    net, generator = Net(), torch.Generator().manual_seed(seed)
    form = StudentOptions(student="lora" if kind == "two loras" else "full", student_rank=4)
    then = [0.4] if kind == "two steps" else []
    student, null = Student(form.grow(net, None, None, generator), make, 1.0, then), {"c": torch.zeros(1, 2)}
    parts = Parts(net, make, student, null, generator=generator)
    if kind == "sds":
        return SDSOptions(**{"lr": 1e-3} | changes).build(parts)
    if kind == "regression":
        return RegressionOptions(**{"lr": 1e-3} | changes).build(parts)
    options = {"guidance": 1.0, "guidance_max": 3.0, "coach_batch": "shared" if kind == "shared" else "fresh"}
    options |= {
        "lr": 1e-3,
        "coach_lr": 2e-3,
        "coach_steps": 2,
        "coach": "lora" if "lora" in kind else "copy",
        "rank": 4,
    }
    return VSDOptions(**options | changes).build(parts)


def batches(step, generator):
    cond = {"c": torch.randn(8, 2, generator=generator)}
    z, x0 = torch.randn(2, 8, 2, generator=generator)
    return {"cond": cond, "shape": (8, 2), "z": z, "x0": x0}


def run(kind, out=None, options=TINY, resume=False, stop=None, source=batches, **changes):
    """Train to the end or to step `stop`; the last step."""
    step = None
    for step in train(build(kind, **changes), source, options, out, resume):
        if step.step == stop:
            break
    gc.collect()
    return step


def contents(out):
    """Everything in the newest checkpoint but the clock."""
    tensors, state, path = store.load(Path(out) / "checkpoints")
    return tensors, {k: v for k, v in state.items() if k != "seconds"}, path.name


def assert_same(a, b):
    (tensors_a, state_a, name_a), (tensors_b, state_b, name_b) = contents(a), contents(b)
    assert name_a == name_b and state_a == state_b and tensors_a.keys() == tensors_b.keys()
    for key in tensors_a:
        assert torch.equal(tensors_a[key], tensors_b[key]), key
