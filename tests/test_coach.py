"""Coaches: what the adapters do, that both kinds are the same coach, and that nothing else learns."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from distill import schedule as S
from distill.coach import CopyCoach, LoraCoach
from distill.denoiser import diffusers_net, from_net
from distill.methods.vsd import VSD, VSDOptions
from distill.sample import one_step

SCHEDULE = S.ddpm(shift=4.0)
NULL = {"encoder_hidden_states": torch.zeros(1, 5, 16), "class_labels": torch.zeros(1, 8)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def built():
    """The tutorial model's U-Net, in miniature."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="projection",
        projection_class_embeddings_input_dim=8,
    )


@pytest.fixture
def unet(built):
    return copy.deepcopy(built)


def make(net):
    return from_net(diffusers_net(net), SCHEDULE, "x0")


def cond(n=4, seed=0):
    g = generator(seed)
    return {"encoder_hidden_states": S.randn((n, 5, 16), g), "class_labels": S.randn((n, 8), g)}


def point(n=4):
    return S.randn((n, 4, 8, 8), generator(7)), torch.linspace(0.1, 0.9, n), cond(n)


def stir(coach, scale=0.05):
    """A coach that has learnt something, whichever."""
    g = generator(9)
    with torch.no_grad():
        for p in coach.parameters():
            p += scale * S.randn(p.shape, g)


def merged(coach):
    """The LoRA coach as one plain set of weights."""
    net = copy.deepcopy(coach.module["coach"])
    for layer in net.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return {k.replace("base_layer.", ""): v for k, v in net.state_dict().items() if "lora_" not in k}


@pytest.mark.parametrize("kind", [LoraCoach, CopyCoach])
def test_a_coach_starts_as_the_teacher_and_leaves_it_alone(unet, kind):
    with torch.no_grad():
        before = make(unet)(*point())
        coach = kind(unet, make)
        assert torch.equal(coach.teacher(*point()), before) and torch.equal(coach.denoiser(*point()), before)
        stir(coach)
        assert torch.equal(coach.teacher(*point()), before)
        assert not torch.allclose(coach.denoiser(*point()), before, atol=1e-2)
        assert torch.equal(coach.teacher(*point()), before)


@pytest.mark.parametrize("kind", [LoraCoach, CopyCoach])
def test_only_the_coach_gets_gradients(unet, kind):
    coach = kind(unet, make)
    stir(coach)
    coach.denoiser(*point()).square().mean().backward()
    trained = {id(p) for p in coach.parameters()}
    assert trained and all((p.grad is not None) == (id(p) in trained) for p in coach.module.parameters())
    assert all(p.requires_grad == (id(p) in trained) for p in coach.module.parameters())


def test_the_teacher_may_be_called_between_the_coachs_forward_and_backward(unet):
    coach = LoraCoach(unet, make, rank=4)
    stir(coach)

    def grads(between):
        for p in coach.parameters():
            p.grad = None
        loss = coach.denoiser(*point()).square().mean()
        between()
        loss.backward()
        return [p.grad.clone() for p in coach.parameters()]

    plain = grads(lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(plain, grads(lambda: coach.teacher(*point()))))


def test_lora_is_on_every_linear_and_convolution(unet):
    expected = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in unet.modules())
    coach = LoraCoach(unet, make, rank=4)
    assert len(coach.parameters()) == 2 * expected
    assert sum("conv" in name for name in coach.state_dict()) > 10
    loss = coach.denoiser(*point()).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in coach.parameters())


def test_targets_narrow_it_to_swiftbrushs_layers(unet):
    coach = LoraCoach(unet, make, rank=4, targets=["to_q", "to_v"])
    assert coach.state_dict() and all("to_q" in name or "to_v" in name for name in coach.state_dict())


def test_lora_draws_from_its_generator_alone(built):
    state = torch.random.get_rng_state()
    a, b, c = (LoraCoach(copy.deepcopy(built), make, rank=2, generator=generator(i)).state_dict() for i in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize("guide", ["teacher", "both"])
def test_a_lora_coach_equals_a_two_copy_coach(built, guide):
    """Merge the adapters into a copy: the same function, and the same gradient for the student."""
    student = copy.deepcopy(built)
    lora = LoraCoach(copy.deepcopy(built), make, rank=4)
    stir(lora)
    two = CopyCoach(copy.deepcopy(built), make)
    two.load_state_dict(merged(lora))
    with torch.no_grad():
        torch.testing.assert_close(two.denoiser(*point()), lora.denoiser(*point()), rtol=1e-4, atol=1e-5)

    def gradient(coach):
        method = VSD(VSDOptions(guidance=3.0, guide=guide), one_step(make(student)), coach, NULL)
        student.zero_grad()
        method.student_loss({"cond": cond(), "shape": (4, 4, 8, 8)}, generator(3))[0].backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    a, b = gradient(lora), gradient(two)
    assert a.norm() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item())


@pytest.mark.parametrize("kind", [LoraCoach, CopyCoach])
def test_state_round_trips(built, kind):
    a, b = (kind(copy.deepcopy(built), make) for _ in range(2))
    stir(a)
    b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(a.denoiser(*point()), b.denoiser(*point()))


def test_a_coach_of_another_shape_is_refused(built):
    a = LoraCoach(copy.deepcopy(built), make, rank=4, targets=["to_q"])
    b = LoraCoach(copy.deepcopy(built), make, rank=4, targets=["to_q", "to_v"])
    with pytest.raises(KeyError, match="same rank, targets"):
        b.load_state_dict(a.state_dict())


def test_the_null_prompt_is_dropped_per_sample(unet):
    """Of every batch some rows, in all their keys, and about the share asked for."""
    student, coach, heard = copy.deepcopy(unet), CopyCoach(unet, make), []
    method = VSD(VSDOptions(null_drop=0.25), one_step(make(student)), coach, NULL)

    def spy(x_t, t, cond):
        heard.append(cond)
        return x_t

    coach.denoiser = spy
    for i in range(20):
        method.coach_loss({"cond": cond(16, i), "shape": (16, 4, 8, 8)}, generator(i))
    rows = torch.stack([(c["class_labels"] == 0).all(1) for c in heard])  # 20, 16
    assert torch.equal(rows, torch.stack([(c["encoder_hidden_states"] == 0).flatten(1).all(1) for c in heard]))
    assert 0.15 < rows.float().mean() < 0.35 and rows.any(0).all() and not rows.all(1).any()


def test_the_coach_learns_the_students_samples_and_the_null_prompt(unet):
    """After some steps it denoises them better than the teacher does, with the prompt and without it."""
    student = copy.deepcopy(unet)
    coach = LoraCoach(unet, make, rank=8)
    method = VSD(VSDOptions(null_drop=0.3), one_step(make(student)), coach, NULL)
    optimizer, g = torch.optim.Adam(coach.parameters(), lr=3e-3), generator(5)
    for i in range(40):
        optimizer.zero_grad()
        method.coach_loss({"cond": cond(16, i), "shape": (16, 4, 8, 8)}, g)[0].backward()
        optimizer.step()
    with torch.no_grad():
        x = method.student(S.randn((16, 4, 8, 8), g), cond(16, 99))
        t = torch.full((16,), 0.3)
        x_t = SCHEDULE.noise(x, t, S.randn(x.shape, g))
        for c in (cond(16, 99), {k: v.expand(16, *v.shape[1:]) for k, v in NULL.items()}):
            errors = [(d(x_t, t, c) - x).square().mean().item() for d in (coach.denoiser, coach.teacher)]
            assert errors[0] < 0.8 * errors[1]
