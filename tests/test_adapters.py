"""Adapters over one set of weights: a teacher, its LoRA student and its LoRA coach."""

import copy
from itertools import chain

import pytest
import torch
from diffusers import UNet2DConditionModel

from distill import schedule as S
from distill.adapters import Lora, chosen, of
from distill.coach import CopyCoach, LoraCoach
from distill.denoiser import diffusers_net, from_net
from distill.methods.vsd import VSD, VSDOptions
from distill.student import Student, StudentOptions
from distill.training.loop import train
from distill.training.options import TrainOptions
from distill.training.state import Average

SCHEDULE = S.ddpm(shift=4.0)
SHAPE = (2, 4, 8, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    ).requires_grad_(False)


@pytest.fixture
def unet(built):
    return copy.deepcopy(built)


def make(net):
    return from_net(diffusers_net(net), SCHEDULE, "eps")


def cond(seed=0):
    return {"encoder_hidden_states": S.randn((2, 5, 16), generator(seed))}


def stir(net, scale=0.05, seed=9):
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += scale * S.randn(p.shape, g)


def held(*nets):
    """Bytes of all the tensors in some nets, each counted once."""
    tensors = {t.data_ptr(): t.nbytes for net in nets for t in chain(net.parameters(), net.buffers())}
    return sum(tensors.values())


def three(unet):
    """(student, coach), both LoRA on one teacher, and both with something learnt."""
    student = Student(Lora(unet, rank=4, generator=generator(7)), make)
    coach = LoraCoach(unet, make, rank=2, generator=generator(8))
    stir(student, seed=1), stir(coach, seed=2)
    return student, coach


def test_teacher_student_and_coach_hold_one_set_of_weights(unet):
    alone = held(unet)
    student, coach = three(unet)
    adapters = sum(p.nbytes for p in (*student.parameters(), *coach.parameters()))
    assert held(unet, student.module, coach.module) == alone + adapters
    assert held(Average(student.module).module, unet) == alone + sum(p.nbytes for p in student.parameters())


def test_each_of_the_three_is_called_as_itself_in_any_order(unet):
    x, t = S.randn(SHAPE, generator()), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        before = make(unet)(x, t, cond())
        student, coach = three(unet)
        calls = [coach.teacher, student.denoiser, coach.denoiser]
        alone = [call(x, t, cond()) for call in calls]
        assert torch.equal(alone[0], before) and not any(torch.allclose(alone[0], a, atol=1e-2) for a in alone[1:])
        for i in (1, 0, 2, 1, 2, 0):
            assert torch.equal(calls[i](x, t, cond()), alone[i])


def test_gradient_checkpointing_runs_the_same_adapters_again(built):
    """The coach and the teacher are called between the student's forward and its backward; the gradients stay."""

    def gradients(checkpointing):
        unet = copy.deepcopy(built)
        student, coach = three(unet)
        if checkpointing:
            for net in (unet, student.module, coach.module["coach"]):
                net.train().enable_gradient_checkpointing()
        method = VSD(VSDOptions(guidance=1.0), student, coach)
        batch = {"cond": cond(), "shape": SHAPE}
        loss, _ = method.student_loss(batch, generator(3))
        other, _ = method.coach_loss(batch, generator(4))
        loss.backward(), other.backward()
        assert all(p.grad is None for p in unet.parameters())
        return [p.grad for p in (*student.parameters(), *coach.parameters())]

    plain, again = gradients(False), gradients(True)
    assert all(g.norm() > 0 for g in plain)
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * a.abs().max().item())


@pytest.mark.parametrize("student", ["full", "lora"])
@pytest.mark.parametrize("coach", ["copy", "lora"])
def test_any_student_with_any_coach_leaves_the_teacher_bitwise(built, student, coach):
    unet = copy.deepcopy(built)
    form = StudentOptions(student=student, student_rank=4)
    one = Student(form.grow(unet, None, None, generator(5)), make)
    made = {"lora": LoraCoach, "copy": CopyCoach}[coach](unet, make)
    start = [p.detach().clone() for p in one.parameters()]
    method = VSD(VSDOptions(guidance=1.0, coach=coach, lr=1e-3), one, made)
    options = TrainOptions(steps=3, max_spread=1e9)
    *_, last = train(method, lambda step, g: {"cond": cond(step), "shape": SHAPE}, options)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), built.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(start, one.parameters()))
    assert last.logs["rel_gap"] > 0
    with torch.no_grad():
        x, t = S.randn(SHAPE, generator()), torch.full((2,), 0.5)
        outs = [make(net)(x, t, cond()) for net in (built, last.student, last.ema)]
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])


def test_the_average_is_of_the_adapters_alone(unet):
    student, _ = three(unet)
    average = Average(student.module)
    assert len(average.state_dict()) == len(student.state_dict())
    before = {n: v.clone() for n, v in average.state_dict().items()}
    stir(student, seed=3)
    average.take(0.75)
    for (name, mean), p in zip(average.state_dict().items(), student.parameters()):
        torch.testing.assert_close(mean, 0.75 * before[name] + 0.25 * p.detach())


def test_adapters_are_told_with_their_scale_folded_in(unet):
    """up(down(x)) of what `of` gives is what the adapted layer adds."""
    lora = Lora(unet, rank=4, alpha=6.0, targets=["attn2.to_k", "conv1"])
    stir(lora)
    folded = of(lora.module)
    found = folded.tensors
    assert found.keys() == lora.state_dict().keys() and of(unet) is None
    for n, v in folded.unfolded().items():
        torch.testing.assert_close(v, lora.state_dict()[n])
    name = next(n for n in found if "conv1.lora_A" in n).removesuffix(".lora_A.weight")
    x = S.randn((1, 32, 8, 8), generator())
    down, up = found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"]
    added = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up)
    with torch.no_grad():
        expected = lora.module.get_submodule(name)(x) - unet.get_submodule(name)(x)
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)


def test_targets_that_mean_nothing_are_named(unet):
    assert all(n.endswith(("to_q", "conv_in")) for n in chosen(unet, ["to_q", "conv_in"]))
    with pytest.raises(ValueError, match="target 'to_x' is no Linear or Conv2d of the net, which has conv_in"):
        Lora(unet, targets=["to_q", "to_x"])


def test_adapters_of_another_shape_are_refused(unet):
    a, b = Lora(unet, rank=4, targets=["to_q"]), Lora(unet, rank=2, targets=["to_q"])
    with pytest.raises(KeyError, match="same rank, targets and net needed"):
        b.load_state_dict(a.state_dict())
