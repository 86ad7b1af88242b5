"""Layers on quantized weights: they load, save, move and compute like the dense layers they stand for."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.packed.layers import QuantConv2d, QuantizedLayer, QuantLinear, install
from distill.packed.weight import QuantError
from distill.quantize.rounding import channelwise, round_to_nearest


def linear(out=24, into=64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    layer = QuantLinear(into, out, bias)
    w = round_to_nearest(torch.randn(out, into, generator=g), 4, 32)
    layer.set_quantized(w)
    return layer, w


def test_a_state_dict_is_what_the_file_holds_bit_for_bit():
    layer, w = linear()
    state = layer.state_dict()
    for key, t in w.to_tensors("x").items():
        assert torch.equal(state[key.removeprefix("x.")], t), key
    assert set(state) == {"weight", "weight_scale", "weight_zero", "comfy_quant", "bias"}
    other = QuantLinear(64, 24, device="meta")
    other.load_state_dict(state, assign=True)
    for key, t in other.state_dict().items():
        assert torch.equal(t, state[key]), key
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))


def test_loading_copies_unless_told_to_assign():
    layer, _ = linear()
    other = QuantLinear(64, 24)
    other.load_state_dict(layer.state_dict())
    assert other.weight_scale.data_ptr() != layer.weight_scale.data_ptr()
    assert other.bias.data_ptr() != layer.bias.data_ptr()


def test_a_dense_layer_loads_as_its_class_always_did():
    layer = QuantLinear(64, 24)
    layer.load_state_dict(nn.Linear(64, 24).state_dict())
    assert not layer.is_quantized and isinstance(layer.weight, nn.Parameter)
    assert layer(torch.randn(2, 64)).shape == (2, 24)


def test_a_quantized_layer_does_not_take_a_dense_weight_in_silence():
    layer, _ = linear()
    with pytest.raises(RuntimeError, match="dense in the state dict"):
        layer.load_state_dict(nn.Linear(64, 24).state_dict())


@pytest.mark.parametrize("change, words", [
    ({"weight": torch.zeros(24, 16, dtype=torch.int8)}, "orig_shape"),
    ({"weight_scale": torch.zeros(3, 24)}, "weight_scale is"),
    ({"bias": torch.zeros(23)}, "bias is"),
])  # fmt: skip
def test_damaged_entries_are_named(change, words):
    state = linear()[0].state_dict() | change
    with pytest.raises(RuntimeError, match=words):
        QuantLinear(64, 24, device="meta").load_state_dict(state, assign=True)


def test_entries_that_belong_to_nobody_are_reported():
    state = linear()[0].state_dict()
    found = QuantLinear(64, 24).load_state_dict(state | {"extra": torch.zeros(1)}, strict=False)
    assert found.unexpected_keys == ["extra"] and found.missing_keys == []
    del state["bias"]
    assert QuantLinear(64, 24).load_state_dict(state, strict=False).missing_keys == ["bias"]


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(QuantError, match=r"\(24, 64\) where the layer's is \(24, 32\)"):
        QuantLinear(32, 24).set_quantized(linear()[1])


def test_half_leaves_the_scales_alone_and_to_moves_everything():
    g = torch.Generator().manual_seed(0)
    layer = QuantLinear(64, 24)
    w = round_to_nearest(torch.randn(24, 64, generator=g) * 1e-6, 4, 32)  # too small for fp16
    layer.set_quantized(w)
    assert w.scale.dtype == torch.float32
    layer.half()
    assert layer.bias.dtype == torch.float16 and torch.equal(layer.weight_scale, w.scale)
    assert {t.device.type for t in layer.to("meta").state_dict().values()} == {"meta"}


def test_a_copy_computes_alone():
    layer, w = linear()
    other = copy.deepcopy(layer)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert torch.allclose(y, F.linear(x, w.dequantize(), layer.bias), atol=1e-5)
    other.weight_scale.mul_(2)
    assert torch.equal(layer(x), y) and not torch.allclose(other(x), y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.rest = nn.Sequential(nn.SiLU(), nn.Conv2d(32, 8, 1, bias=False))
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.norm(self.rest(self.conv(x)).movedim(1, -1)))


def quantized(net, prefix=""):
    """The net's state dict with `conv` and `rest.1` quantized, and the dense state dict that stands for."""
    state = {prefix + k: v for k, v in net.state_dict().items()}
    dense = net.state_dict()
    for name, make in (("conv", lambda w: round_to_nearest(w, 4, 16)), ("rest.1", channelwise)):
        w = make(dense[name + ".weight"])
        del state[prefix + name + ".weight"]
        state |= w.to_tensors(prefix + name)
        dense[name + ".weight"] = w.dequantize()
    return state, dense


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_install_replaces_marked_layers_and_hands_back_the_rest(device):
    torch.manual_seed(0)
    net = Net()
    state, dense = quantized(net, "model.")
    net.load_state_dict(dense)
    with torch.device(device):
        model = Net()
    rest = install(model.eval(), state, "model.")
    assert sorted(rest) == ["norm.bias", "norm.weight", "out.bias", "out.weight"]
    found = model.load_state_dict(rest, strict=False, assign=True)
    assert not found.unexpected_keys
    assert isinstance(model.conv, QuantConv2d) and isinstance(model.rest[1], QuantizedLayer)
    assert not model.conv.training and type(model.out) is nn.Linear
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        assert torch.allclose(model(x), net(x), atol=1e-4)
    assert set(model.state_dict()) == {k.removeprefix("model.") for k in state}


def test_install_names_a_layer_the_model_lacks_or_cannot_quantize():
    state, _ = quantized(Net())
    with pytest.raises(QuantError, match=r"rest\.1.*missing"):
        install(nn.ModuleDict({"conv": Net().conv, "rest": nn.Identity()}), state)
    with pytest.raises(QuantError, match=r"conv.*LayerNorm"):
        install(nn.ModuleDict({"conv": nn.LayerNorm(8)}), state)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_runs_leave_no_tensor_behind(activations):
    """What a run needs is kept from the first one on, and nothing is added by later ones."""

    def alive():
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        return len(found), sum(o.nbytes for o in found)

    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 1), nn.Flatten(2), nn.Linear(256, 256))
    state = {}
    for name in ("0", "1", "3"):
        layer = net[int(name)]
        packed = round_to_nearest(torch.randn(layer.weight.shape, generator=g), 4, 32).to_tensors(name)
        state |= packed | {f"{name}.bias": layer.bias}
    install(net, state)
    for i in (0, 1, 3):
        net[i].activations = activations
    x = torch.randn(2, 32, 16, 16, generator=g)
    with torch.no_grad():
        for _ in range(3):
            net(x)
        before = alive()
        for _ in range(20):
            net(x)
    assert alive() == before


def test_circular_padding_stays_dense():
    layer = QuantConv2d(16, 16, 3, padding=1, padding_mode="circular")
    with pytest.raises(QuantError, match="padding_mode 'circular'"):
        layer.set_quantized(round_to_nearest(torch.randn(16, 16, 3, 3), 4, 16))
