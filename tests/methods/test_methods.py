"""What a method tells the loop: nets, phases, what comes after a step. A third net is nothing special."""

import copy

import pytest
import torch
from small_runs import SCHEDULE, TINY, Net, assert_same, batches, build, contents, make, run
from torch import nn

from distill import toy
from distill.denoiser import from_net, guided
from distill.methods import METHODS
from distill.methods.base import Method, Parts, Phase
from distill.methods.base import Net as Trained
from distill.methods.regression import RegressionOptions
from distill.methods.vsd import VSD, VSDOptions
from distill.sample import solve_from
from distill.schedule import randn
from distill.student import Student
from distill.training.loop import train


class Adversarial(VSD):
    """VSD with a critic of the student's samples: a third net, with a loss of its own and a target that follows it."""

    def __init__(self, vsd):
        super().__init__(vsd.options, vsd.student, vsd.coach, vsd.null)
        self.critic = nn.Linear(2, 1)
        nn.init.zeros_(self.critic.weight), nn.init.zeros_(self.critic.bias)
        self.seen = []

    @property
    def nets(self):
        return {**super().nets, "critic": Trained(self.critic, 1e-2, average=True)}

    def phases(self, step):
        yield from super().phases(step)
        yield Phase("critic", self.critic_loss, fresh=False)

    def critic_loss(self, batch, generator):
        loss = (self.critic(batch["x0"]) - 1).square().mean() + (self.critic(batch["x"])).square().mean()
        return loss, {"critic_loss": loss.detach()}

    def after(self, step, averages):
        self.seen.append((step, sorted(averages), averages["critic"].weight.clone()))


def adversarial():
    return Adversarial(build("shared", coach_steps=1))


def test_a_third_net_is_trained_averaged_saved_and_resumed(tmp_path):
    method = adversarial()
    steps = list(train(method, batches, TINY, tmp_path / "straight"))
    assert method.critic.weight.norm() > 0 and "critic_grad_norm" in steps[-1].logs
    assert [s for s, _, _ in method.seen] == list(range(12)) and method.seen[0][1] == ["critic", "student"]
    assert not torch.equal(method.seen[-1][2], method.critic.weight)  # the average lags
    names = {k.split("/")[0] for k in contents(tmp_path / "straight")[0]}
    assert {"critic", "critic_average", "critic_optimizer"} <= names
    for step in train(adversarial(), batches, TINY, tmp_path / "halted"):
        if step.step == 7:
            break
    list(train(adversarial(), batches, TINY, tmp_path / "halted", resume=True))
    assert_same(tmp_path / "straight", tmp_path / "halted")


class Growing(Method):
    """Trains nothing but a number, and swaps its teacher after each step: what progressive distillation needs."""

    def __init__(self):
        self.x, self.teacher = nn.Linear(1, 1, bias=False), None

    @property
    def nets(self):
        return {"student": Trained(self.x, 0.1, average=True)}

    def phases(self, step):
        yield Phase("student", lambda batch, generator: ((self.x.weight - step).square().sum(), {}))

    def after(self, step, averages):
        self.teacher = copy.deepcopy(averages["student"])


def test_the_teacher_can_be_swapped_after_a_step():
    method = Growing()
    for step in train(method, lambda step, generator: {}, TINY):
        assert torch.equal(method.teacher.weight, step.ema.weight)


# ------------------------------------------------------------------------------------------------- the methods' own


@pytest.mark.parametrize("name", METHODS)
def test_options_build_the_method_and_leave_the_teacher_as_it_was(name):
    net = Net()
    before, calls = copy.deepcopy(net.state_dict()), net(torch.ones(1, 2), torch.ones(1), {"c": torch.ones(1, 2)})
    parts = Parts(net, make, Student(copy.deepcopy(net), make), {"c": torch.zeros(1, 2)})
    options = METHODS[name](guidance=1.0)
    method = options.build(parts)
    *_, last = train(method, batches, TINY)
    assert "student_loss" in last.logs and "student" in method.nets
    assert net.state_dict().keys() == before.keys() and all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )
    assert torch.equal(net(torch.ones(1, 2), torch.ones(1), {"c": torch.ones(1, 2)}), calls)


def test_each_coach_step_but_a_shared_first_one_draws_its_own_batch():
    for kind, expected in (("shared", 3), ("copy", 3)):
        method, seen = build(kind, coach_steps=3), []
        loss = method.coach_loss
        method.coach_loss = lambda batch, g, loss=loss, seen=seen: (seen.append(batch), loss(batch, g))[1]
        next(train(method, batches, TINY))
        firsts = seen[:: TINY.accumulate]
        assert len({b["z"].sum().item() for b in firsts}) == expected
        assert ["x" in b for b in firsts] == [True, False, False]  # the student's batch, then fresh ones


def test_the_teacher_is_guided_in_the_loss():
    """The gradient is that of the guided teacher, and not that of the plain one."""
    teacher = toy.Mixture(toy.ring(2), 0.3, SCHEDULE)
    null = {"mode": torch.tensor([-1])}

    def gradient(guidance):
        student = nn.Linear(2, 2)
        with torch.no_grad():
            student.weight.copy_(torch.eye(2)), student.bias.zero_()
        options = VSDOptions(guidance=guidance, weight="one")
        method = VSD(options, lambda z, cond: student(z), toy.Coach(teacher), null)
        batch = {"cond": {"mode": torch.zeros(64, dtype=torch.long)}, "shape": (64, 2)}
        method.student_loss(batch, torch.Generator().manual_seed(0))[0].backward()
        return student.bias.grad

    # the coach starts as the plain teacher: without guidance there is nothing to follow
    assert gradient(1.0).abs().max() < 1e-7 and gradient(3.0)[0] < -0.01  # towards the mode at (1, 0)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"t_min": 2}, "t_min, t_max is .2, 0.98.: 0 <= t_min < t_max <= 1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"rank": 0}, "rank is 0: 1 to 16384"),
        ({"rank": 10**6}, "rank is 1000000"),
        ({"lr": -1}, "lr is -1: above 0"),
        ({"null_drop": 2}, "null_drop is 2"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        VSDOptions(**wrong)


def test_autoguidance_without_a_weaker_teacher_is_told_before_anything_runs():
    with pytest.raises(ValueError, match="needs a weaker teacher"):
        build("copy", autoguidance=2.0)


def test_pairs_are_made_once(tmp_path):
    """A regression that goes on finds its pairs; another seed's folder makes its own."""
    told = []

    def pairs(folder):
        method = build("regression", pairs=20, guidance=1.0)
        return method.data(batches, torch.Generator().manual_seed(0), folder, lambda what, share: told.append(what))

    first, count = pairs(tmp_path / "a"), len(told)
    again = pairs(tmp_path / "a")
    assert count > 0 and len(told) == count and first.batch_size == again.batch_size
    (a, b) = (p(0, torch.Generator().manual_seed(0)) for p in (first, again))
    assert torch.equal(a["x0"], b["x0"]) and torch.equal(a["cond"]["c"], b["cond"]["c"])
    pairs(tmp_path / "b")
    assert len(told) == 2 * count


def test_a_student_is_one_call_at_its_time():
    net = Net()
    student, cond = Student(net, make, 0.5), {"c": torch.ones(3, 2)}
    z = randn((3, 2), torch.Generator().manual_seed(0))
    scale = (0.5**2 + 0.5**2) ** 0.5
    torch.testing.assert_close(student(z, cond), make(net)(scale * z, torch.full((3,), 0.5), cond))
    assert run("regression").student is not net


def test_a_later_call_learns_where_the_guided_teacher_goes_from_the_call_before():
    """Its gradient is that of the squared error to the law's solver, from noise on what the student drew; nothing
    reaches the net through the first call, and the coach sees first calls alone."""
    method = build("two steps", guidance=2.0, guidance_max=None, guidance_until=0.3)
    student, net, batch = method.student, method.student.module, batches(0, torch.Generator().manual_seed(0))
    assert student.times == [1.0, 0.4]
    first, later = [phase.loss for phase in method.phases(0) if phase.net == "student"]
    first(batch, torch.Generator().manual_seed(1))
    drawn = batch["x"]
    loss, logs = later(batch, torch.Generator().manual_seed(2))
    got = torch.autograd.grad(loss, net.mlp.parameters())

    at = torch.full((8,), 0.4)
    x_t = SCHEDULE.noise(drawn, at, randn((8, 2), torch.Generator().manual_seed(2)))
    law = guided(method.teacher, 2.0, method.null, until=0.3)
    target = solve_from(law, x_t, [0.4, 0.2, 0.1], batch["cond"])
    x = make(net)(x_t, at, batch["cond"])
    expected = (x - target).square().mean()
    assert logs["call_2_loss"] == pytest.approx(expected.item())
    torch.testing.assert_close(got, torch.autograd.grad(expected, net.mlp.parameters()))
    assert batch["x"] is drawn and torch.equal(batch["before"], x.detach())


def test_pairs_are_the_guided_teachers():
    """What VSD draws a student to, regression can begin with: the same guidance, up to the same time, and away from a
    weaker teacher."""
    net, weak = Net(), from_net(lambda x, index, cond: 0.5 * x, SCHEDULE, "x0")
    null, x, t = {"c": torch.zeros(1, 2)}, torch.ones(4, 2), torch.tensor([0.1, 0.4, 0.41, 0.9])
    cond, parts = {"c": torch.ones(4, 2)}, Parts(net, make, Student(Net(), make), null, weak)
    law = RegressionOptions(guidance=3.0, guidance_until=0.4, autoguidance=1.5).build(parts).teacher
    given, unknown = make(net)(x, t, cond), make(net)(x, t, {"c": torch.zeros(4, 2)})
    w = torch.tensor([3.0, 3.0, 1.0, 1.0])[:, None]
    torch.testing.assert_close(law(x, t, cond), unknown + w * (given - unknown) + 0.5 * (given - weak(x, t, cond)))


def test_pairs_teach_one_call():
    student = Student(Net(), make, then=[0.5])
    with pytest.raises(ValueError, match="calls is 2.*--init"):
        RegressionOptions().build(Parts(Net(), make, student))
