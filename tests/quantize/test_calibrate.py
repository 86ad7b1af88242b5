"""Statistics of layers' inputs: the order of a convolution's rows, uniform samples, seeds, and streaming."""

import pytest
import torch
from torch import nn

from distill.backbones.skeleton import skeleton
from distill.packed.weight import QuantError, to_matrix
from distill.quantize.calibrate import LayerStats, collect, relative_error
from distill.quantize.stream import stream
from distill.quantize.views import Dequantized, Renamed


def run(module, x):
    return collect(nn.ModuleDict({"m": module}), {"m": "key"}, lambda: module(x), rows=4096)["key"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": (0, 1)},
        {"kernel_size": (1, 3), "padding": "same", "dilation": 2},
        {"kernel_size": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_rows_times_the_matrix_is_the_convolution(conv):
    module = nn.Conv2d(6, 5, bias=False, **conv)
    x = torch.randn(2, 6, 9, 8, generator=generator())
    stats = run(module, x)
    y = (stats.rows @ to_matrix(module.weight).t()).detach()
    expected = module(x).detach().permute(0, 2, 3, 1).flatten(0, 2)
    assert len(y) == len(expected)  # all rows were kept: the same set, in the sample's order
    distance = torch.cdist(y, expected, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(1).values.max() < 1e-4 and distance.min(0).values.max() < 1e-4
    torch.testing.assert_close(stats.mean, x.abs().mean((0, 2, 3)))
    torch.testing.assert_close(stats.peak, x.abs().amax((0, 2, 3)))


def test_linear_rows_over_several_calls():
    module = nn.Linear(7, 3)
    xs = [torch.randn(2, 5, 7, generator=generator(i)) for i in range(3)]
    stats = collect(nn.Sequential(module), {"0": "k"}, lambda: [module(x) for x in xs], rows=1000)["k"]
    everything = torch.cat([x.flatten(0, 1) for x in xs])
    assert sorted(map(tuple, stats.rows.tolist())) == sorted(map(tuple, everything.tolist()))
    torch.testing.assert_close(stats.mean, everything.abs().mean(0))


def test_the_sample_is_uniform_over_calls_and_repeats_by_seed():
    module = nn.Linear(1, 1)

    def feed():
        for i in range(10):  # call i is worth 10 i + 10 rows, all with the value i
            module(torch.full((10 * i + 10, 1), float(i)))

    def sample(seed):
        return collect(nn.Sequential(module), {"0": "k"}, feed, rows=110, seed=seed)["k"].rows[:, 0]

    assert torch.equal(sample(3), sample(3)) and not torch.equal(sample(3), sample(4))
    counts = sum(torch.bincount(sample(s).long(), minlength=10) for s in range(100)).float()
    expected = torch.arange(1, 11) * 110 * 100 / 55
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_a_layer_that_never_runs_is_missing_and_hooks_go_away():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    found = collect(model, {"a": "A", "b": "B"}, lambda: model["a"](input=torch.ones(1, 4)))
    assert found.keys() == {"A"} and not model["a"]._forward_pre_hooks
    with pytest.raises(QuantError, match="layer A: its input is not finite"):
        collect(model, {"a": "A"}, lambda: model["a"](torch.full((1, 4), torch.inf)))
    assert not model["a"]._forward_pre_hooks


def test_relative_error_is_of_the_output_where_it_is_known():
    w, rows = torch.eye(4), torch.tensor([[1.0, 0, 0, 0]])
    off = w.clone()
    off[3, 3] = 0
    assert relative_error(w, off, None) == 0.5
    assert relative_error(w, off, LayerStats(rows[0], rows)) == 0


# ------------------------------------------------------------------------------------------------------ streaming


class Counted(dict):
    """A state dict that knows how much of it was handed out at once."""

    def __init__(self, weights):
        super().__init__(weights)
        self.reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return super().__getitem__(key).clone()


def deep(width=256, depth=24):
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)])


def test_a_streamed_model_holds_one_layer_at_a_time():
    dense, empty = deep(), skeleton(deep)
    weights = Counted(dense.half().state_dict())
    stream(empty, weights)
    held = []
    for module in empty.modules():
        if isinstance(module, nn.Tanh):  # between two layers
            module.register_forward_hook(lambda *_: held.append(resident(empty)))
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda *_: held.append(resident(empty)))
    x = torch.randn(3, 256, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(empty(x), dense.float()(x))
    assert max(held) == 256 * 257 and resident(empty) == 0 and weights.reads == 48


def resident(model):
    return sum(p.numel() for p in model.parameters() if not p.is_meta)


def test_weights_are_dropped_after_an_error_too():
    empty = skeleton(deep)
    stream(empty, deep().state_dict())
    with pytest.raises(RuntimeError):
        empty(torch.ones(3, 5))
    assert resident(empty) == 0


def test_a_wrong_shape_or_name_is_told():
    empty = skeleton(lambda: nn.Sequential(nn.Linear(4, 4)))
    stream(empty, Renamed({"a": torch.ones(2, 4)}, {"0.weight": "a"}))
    with pytest.raises(ValueError, match=r"0.weight is \(2, 4\) where .* says \(4, 4\)"):
        empty(torch.ones(1, 4))
    with pytest.raises(KeyError, match="no weight for 0.bias"):
        Renamed({}, {})["0.bias"]


def test_dequantized_is_the_dense_state_dict():
    from distill.quantize.rounding import round_to_nearest

    q = round_to_nearest(torch.randn(8, 64, generator=generator()), 4, 32)
    seen = Dequantized(q.to_tensors("l") | {"l.bias": torch.ones(8)})
    assert torch.equal(seen["l.weight"], q.dequantize()) and torch.equal(seen["l.bias"], torch.ones(8))
