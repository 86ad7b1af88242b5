"""A module in memory, quantized in place."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import distill
from distill.packed.layers import QuantConv2d, QuantLinear, install
from distill.packed.weight import QuantError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build():
    """Layers that fit, one that does not (3 channels), one with groups."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, groups=64),
        nn.Flatten(), nn.Linear(64 * 36, 32), nn.SiLU(), nn.Linear(32, 8),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(p.numel())) * p[0].numel() ** -0.5)
    return net.eval()


X = torch.randn(16, 3, 8, 8, generator=generator(7)) * torch.tensor([1.0, 5.0, 0.2]).view(1, 3, 1, 1)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("how", [{}, {"method": "rtn"}, {"method": "svd"}, {"bits": 8}, {"method": "smoothquant"}])
@torch.no_grad()
def test_layers_are_replaced_in_place(tmp_path, how):
    net = build()
    before = net(X)
    assert distill.quantize_(net, distill.Quantize(**how), run=lambda: net(X)) is net
    kinds = [type(m) for m in net]
    assert kinds[2] is QuantConv2d and kinds[5] is kinds[7] is QuantLinear and kinds[0] is kinds[3] is nn.Conv2d
    assert 0 < error(net(X), before) < (0.02 if 8 in how.values() or "smoothquant" in how.values() else 0.15)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    other = build()
    other.load_state_dict(install(other, load_file(tmp_path / "net.safetensors")), strict=False)
    assert torch.equal(other(X), net(X))


@torch.no_grad()
def test_calibration_helps():
    errors = {}
    for run in (True, False):
        net = build()
        before = net(X)
        distill.quantize_(net, distill.Quantize(bits=3), run=(lambda net=net: net(X)) if run else None)
        errors[run] = error(net(X), before)
    assert errors[True] < errors[False]


@torch.no_grad()
def test_some_layers_only():
    net = distill.quantize_(build(), fits=lambda name, layer: isinstance(layer, nn.Linear))
    assert [type(net[i]) for i in (2, 5)] == [nn.Conv2d, QuantLinear]


@torch.no_grad()
def test_layers_that_compute_in_their_own_way_stay_dense():
    """Attention of torch's own reads its projections' weights itself; reflected borders are not the packed layers'."""
    net = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(64, 4, batch_first=True),
            "mirror": nn.Conv2d(64, 8, 3, padding=1, padding_mode="reflect"),
            "linear": nn.Linear(64, 64),
        }
    ).eval()
    x = torch.randn(2, 5, 64, generator=generator())
    expected = net["attention"](x, x, x)[0]
    distill.quantize_(net)
    assert [type(net[n]) for n in ("mirror", "linear")] == [nn.Conv2d, QuantLinear]
    assert torch.equal(net["attention"](x, x, x)[0], expected)


@torch.no_grad()
def test_layers_that_never_ran_are_told(caplog):
    net = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    distill.quantize_(net, run=lambda: net["a"](torch.ones(1, 64)))
    assert type(net["b"]) is QuantLinear and "1 layers never ran in calibration" in caplog.text and ": b" in caplog.text


@torch.no_grad()
def test_half_precision_modules():
    net, x = build().bfloat16(), X.bfloat16()
    before = net(x)
    distill.quantize_(net, run=lambda: net(x))
    assert net(x).dtype == torch.bfloat16 and error(net(x).float(), before.float()) < 0.15


def test_what_cannot_be_asked():
    with pytest.raises(QuantError, match=r"awq needs calibration \(pass run\)"):
        distill.quantize_(build(), distill.Quantize(method="awq"))
    with pytest.raises(QuantError, match="use quantize_file"):
        distill.quantize_(build(), distill.Quantize(budget=4.5))
    with pytest.raises(QuantError, match="no layer to quantize"):
        distill.quantize_(nn.Sequential(nn.Linear(3, 3)))
