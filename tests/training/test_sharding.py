"""A sharded net, in a group of one process: cut block by block, it computes, learns, is saved and loaded as a whole one
is. Groups of two are in test_processes.py."""

import copy
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from small_runs import build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from distill.schedule import randn
from distill.training import sharding
from distill.training.optimizers import load_state, make_optimizer, state_tensors
from distill.training.options import TrainOptions


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def given(seed):
    g = torch.Generator().manual_seed(seed)
    x, words, small = randn((2, 8, 8, 8), g), randn((2, 32, 128), g), randn((2, 128), g)
    return {"sample": x, "timestep": torch.tensor([10, 900]), "encoder_hidden_states": words, "class_labels": small}


def learn(net, optimizer, seed):
    net(**given(seed)).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def assert_same(*nets):
    """In what they put out: gradients before a norm are rounding alone, which AdamW makes large."""
    first, *rest = (net(**given(9)).sample for net in nets)
    for other in rest:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)
    return first


def test_a_sharded_net_learns_and_comes_back_as_a_whole_one(mesh):
    whole = tiny.modules().unet.requires_grad_(True)
    whole.train().enable_gradient_checkpointing()
    cut, before = copy.deepcopy(whole), assert_same(whole)
    sharding.shard(cut, mesh)
    assert sum(isinstance(m, FSDPModule) for m in cut.modules()) > 3, "blocks, each by itself"
    optimizers = [make_optimizer(TrainOptions(), list(net.parameters()), 1e-3) for net in (whole, cut)]
    for net, optimizer in zip((whole, cut), optimizers):
        learn(net, optimizer, 0)
    plain = copy.deepcopy(sharding.whole(cut))  # one process gathers no copy
    assert type(plain) is type(whole) and not torch.allclose(assert_same(whole, cut, plain), before, atol=1e-3)

    kept = {key: v.clone() for key, v in sharding.gathered(state_tensors(optimizers[1]), True).items()}
    params = list(cut.parameters())
    for p in params:
        optimizers[1].state[p]["exp_avg"].zero_()
    load_state(optimizers[1], sharding.cut(kept, {key: params[int(key.partition("/")[0])] for key in kept}))
    cut.load_state_dict(sharding.cut(plain.state_dict(), cut.state_dict()))
    for net, optimizer in zip((whole, cut), optimizers):
        learn(net, optimizer, 1)
    assert_same(whole, cut, sharding.whole(cut))


def test_a_process_that_keeps_nothing_gets_nothing_and_a_whole_net_is_itself(mesh):
    net = torch.nn.Linear(3, 4)
    assert sharding.whole(net, keep=False) is net
    sharding.shard(net, mesh)
    assert sharding.whole(net, keep=False) is None and sharding.gathered(net.state_dict(), False) == {}


@pytest.mark.parametrize(
    "options, version, told",
    [
        ({}, "1", "fsdp_version is '1': launch with --fsdp_version 2"),
        ({"optimizer": "adamw8bit"}, "2", "optimizer is 'adamw8bit': sharded nets (FSDP) take only adamw"),
        ({"compile": True}, "2", "compile is True: sharded nets"),
        ({"ema_on_cpu": True}, "2", "ema_on_cpu is True: sharded nets"),
    ],
)
def test_what_does_not_go_with_sharded_nets_is_refused(monkeypatch, options, version, told):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match=re.escape(told)):
        sharding.mesh_of(SimpleNamespace(num_processes=2), torch.device("cpu"), TrainOptions(**options))
    alone = SimpleNamespace(num_processes=1)
    assert sharding.mesh_of(alone, torch.device("cpu"), TrainOptions(**options)) is None


def test_adapters_are_not_sharded(mesh):
    with pytest.raises(ValueError, match="adapters are not sharded"):
        sharding.shard_all(build("two loras").nets, {}, mesh)
