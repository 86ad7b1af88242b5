"""A teacher of one's own: a plain network, with conditions and without. README.md shows one; test_docs.py runs that."""

import pytest
import torch
from torch import nn

import distill
from distill.schedule import ddpm, flow, randn
from distill.student import StudentOptions

SHAPE = (2, 6, 6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Told the time, and a number from 0 to 4 where it knows `digits`."""

    def __init__(self, digits: int = 0):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3, padding=1)
        self.digit = nn.Embedding(digits, 2) if digits else None

    def forward(self, x, time, digit=None):
        clock = (time / 1000)[:, None, None, None].expand(-1, 1, 6, 6)
        out = self.layer(torch.cat([x, clock], 1))
        return out if self.digit is None else out + self.digit(digit)[..., None, None]


def teacher(**how):
    torch.manual_seed(0)
    if how.pop("conditions"):
        return distill.Own(Net(5), SHAPE, "eps", ddpm(), null=torch.tensor([4]), **how)
    return distill.Own(Net(), SHAPE, "flow", flow(), **how)


@pytest.mark.parametrize("conditions, form", [(True, "full"), (False, "full"), (True, "lora")])
def test_a_plain_network_is_taught_and_its_student_comes_back(conditions, form, tmp_path):
    mine = teacher(conditions=conditions)

    def batches(step, generator):
        return {"cond": torch.randint(4, (8,), generator=generator) if conditions else None, "shape": mine.shape(8)}

    options = distill.VSDOptions(guidance=2.0 if conditions else 1.0, rank=2, lr=1e-2)
    form = StudentOptions(form, student_rank=2)
    training = distill.TrainOptions(steps=2, ema=0.0, max_spread=1e4)
    *_, last = distill.train_student(mine, options, batches, training, student=form)
    path = mine.save_student(tmp_path / "mine.safetensors", last.ema, method="vsd", steps=2)
    student = mine.open(path)
    assert student.meta.method == "vsd" and student.meta.teacher == "Net" and student.name == "mine.safetensors"
    assert not torch.equal(student.net.layer.weight, mine.net.layer.weight)
    z, cond = randn(mine.shape(3), generator()), torch.tensor([0, 1, 2]) if conditions else None
    ours = student.latents(z, cond, generator=generator(1))
    by_hand = distill.few_step(mine.wrap(last.ema), [1.0, 0.5])(z, cond, generator(1))
    torch.testing.assert_close(ours, by_hand.detach(), rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    with pytest.raises(distill.CheckpointError, match="mine.safetensors: a student of a network of its owner's own"):
        distill.load(path)


def test_prompts_and_pictures_are_what_their_functions_say(tmp_path):
    words = ["none", "ring"]
    how = {"encode": lambda prompts: torch.tensor([words.index(p) for p in prompts]), "decode": lambda x: x[:, :1] / 2}
    mine = teacher(conditions=True, **how)
    pictures = mine.sample(["ring", "none"], generator(), steps=3, guidance=1.5)
    latents = mine.latents(randn(mine.shape(2), generator()), torch.tensor([1, 0]), steps=3, guidance=1.5)
    torch.testing.assert_close(pictures, latents[:, :1] / 2)
    other = distill.Own(Net(), SHAPE, "eps", ddpm())
    path = other.save_student(tmp_path / "other.safetensors", other.net)
    with pytest.raises(distill.CheckpointError, match="wrong architecture: the network lacks 'digit.weight'"):
        mine.open(path)
