"""Rounding, clipping, AWQ, the low-rank branch and SmoothQuant against what can be said about them on paper."""

import pytest
import torch

from distill.packed.weight import QuantizedWeight, to_matrix, unpack_nibbles
from distill.quantize import awq, lowrank, rounding, smooth, squant
from distill.quantize.calibrate import LayerStats, collect, relative_error


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 8


def seen(weight, seed=1, outliers=True):
    """Inputs of very uneven channels."""
    g = torch.Generator().manual_seed(seed)
    size = torch.randn(weight.shape[1], generator=g).exp() if outliers else torch.ones(weight.shape[1])
    rows = torch.randn(256, to_matrix(weight).shape[1], generator=g) * awq.taps(size, weight)
    return LayerStats(rows.view(256, -1, weight.shape[1]).abs().mean((0, 1)), rows)


SHAPES = [(24, 128), (16, 64, 3, 3), (8, 96, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_nearest_is_within_half_a_step(shape, bits):
    w = make(*shape)
    q = rounding.round_to_nearest(w, bits, 32)
    steps = q.scale.float().t().repeat_interleave(32, 1)
    assert ((q.matrix() - to_matrix(w)).abs() <= steps * 0.5 + 2e-3 * to_matrix(w).abs().max()).all()
    codes = unpack_nibbles(q.codes)
    assert codes.max() == 2**bits - 1 and codes.min() == 0
    assert q.bits == bits and q.scale.dtype == torch.float16


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_what_lies_on_the_grid_is_exact(bits):
    codes = torch.randint(0, 2**bits, (8, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1  # every group spans its range
    w = (codes - 3.0) / 16
    for q in (rounding.round_to_nearest(w, bits, 32), rounding.clip(w, bits, 32)):
        assert torch.equal(q.dequantize(), w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_clip_is_never_worse_than_nearest_on_what_it_minimises(shape, bits):
    w, stats = make(*shape), None
    w.view(-1)[::97] *= 4  # outliers
    nearest, clipped = rounding.round_to_nearest(w, bits, 32), rounding.clip(w, bits, 32)
    assert felt(clipped, w) < 0.97**2 * felt(nearest, w)
    stats = seen(w)
    by_output = rounding.clip(w, bits, 32, stats.rows)
    assert relative_error(w, by_output.dequantize(), stats) < relative_error(w, clipped.dequantize(), stats)


def felt(q, w):
    """The squared error of the outputs where taps of a kernel are correlated by a half."""
    d = (q.dequantize() - w).flatten(2) if w.ndim == 4 else q.dequantize() - w
    return (d.square().sum() + (d.sum(2).square().sum() if d.ndim == 3 and d.shape[2] > 1 else 0)).item()


def test_a_smooth_picture_comes_out_better_than_from_the_nearest_codes():
    """On inputs whose neighbouring pixels are alike."""
    g = torch.Generator().manual_seed(0)
    w, x = make(32, 64, 3, 3), torch.randn(4, 64, 18, 18, generator=g)
    x = torch.nn.functional.avg_pool2d(x, 3, 1)  # correlated by 2/3 with those beside, 1/3 with those two away
    exact = torch.nn.functional.conv2d(x, w)

    def error(q):
        return (torch.nn.functional.conv2d(x, q.dequantize()) - exact).norm() / exact.norm()

    found = rounding.clip(w, 4, 64)
    assert (found.zero is None) == (found.group_size == 32)
    nearest = rounding.fitted(w, 4, found.group_size, None, signed=found.zero is None)
    assert torch.equal(found.scale, nearest.scale) and not torch.equal(found.codes, nearest.codes)
    assert error(found) < 0.9 * error(nearest)


@pytest.mark.parametrize("bits", [4, 3])
def test_of_each_kernel_the_one_code_that_saves_most_is_moved(bits):
    """Against every way to move one code of each kernel by one, tried."""
    w = make(6, 32, 3, 3)
    nearest = rounding.fitted(w, bits, 32, None, signed=bits == 4)
    found = squant.balanced(nearest, w, 300)  # a row at a time

    def kernels(q):
        return q.dequantize().flatten(2) - w.flatten(2)

    def errors(d):
        return d.square().sum(-1) + d.sum(-1).square()

    d, codes = kernels(nearest), unpack_nibbles(nearest.codes).view(6, 9, 32).transpose(1, 2)
    best = errors(d)
    for tap in range(9):
        for move in (-1, 1):
            new = codes[..., tap].int() + move
            tried = d.clone()
            tried[..., tap] += move * nearest.scale[tap].float()[:, None]  # a group is a tap of all channels
            best = torch.minimum(best, errors(tried).where((new >= 0) & (new < 2**bits), best))
    torch.testing.assert_close(errors(kernels(found)), best, rtol=1e-4, atol=1e-8)
    assert best.sum() < 0.7 * errors(d).sum()


def test_least_squares_recovers_the_scale_of_its_codes():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4, 2, 32), generator=g)
    scale, zero = torch.rand(4, 2, 1, generator=g) + 0.5, torch.randn(4, 2, 1, generator=g)
    w = (codes - 8) * scale + zero
    for hessian in (None, rounding.gram(torch.randn(100, 64, generator=g), 32)):
        s, z = rounding.least_squares(w, scale * 1.01, zero + 0.05 * scale, 4, hessian)
        torch.testing.assert_close(s, scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(z, zero, rtol=1e-4, atol=1e-4)


def test_output_error_is_the_quadratic_form_of_the_gram_matrix():
    g = torch.Generator().manual_seed(0)
    rows, d = torch.randn(500, 64, generator=g), torch.randn(3, 1, 64, generator=g)
    h = rounding.gram(rows, 64)
    direct = (rows @ d[:, 0].t()).square().mean(0)
    torch.testing.assert_close(rounding.by(h)(d)[:, 0], direct, rtol=0.05, atol=0)  # the diagonal's floor is in it


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(1.0, torch.float16), (1e-5, torch.float32), (1e6, torch.float32)],
    ids=["as usual", "too small for fp16", "too large for fp16"],
)
def test_scales_are_fp16_where_fp16_holds_them(change, dtype):
    w = make(8, 64) * change
    q = rounding.round_to_nearest(w, 4, 32)
    assert q.scale.dtype == q.zero.dtype == dtype
    assert relative_error(w, q.dequantize(), None) < 0.1
    eight = rounding.channelwise(w)
    assert relative_error(w, eight.dequantize(), None) < 0.01


def test_an_offset_far_from_zero_keeps_its_precision():
    w = 1000 + make(8, 64)
    q = rounding.round_to_nearest(w, 4, 32)
    assert q.zero.dtype == torch.float32 and (q.dequantize() - w).abs().max() < 0.05


def q4_0(w):
    """ggml's quantize_row_q4_0_ref, dequantized: the number of largest size of 32 becomes -8."""
    groups = w.reshape(-1, 32)
    d = (groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8).half().float()
    return ((groups / d + 8.5).floor().clamp(0, 15).sub(8) * d).view_as(w)


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "one-sided"])
def test_clip_beats_q4_0_at_equal_bits_with_whichever_grid_fits(kind):
    g = torch.Generator().manual_seed(0)
    w = torch.rand(64, 256, generator=g) - 0.5 if kind == "uniform" else torch.randn(64, 256, generator=g)
    w = w.abs() if kind == "one-sided" else w
    q = rounding.clip(w, 4, 64)
    assert q.bits_per_weight == 4.5 and (q.zero is None, q.group_size) in ((True, 32), (False, 64))
    assert (q.zero is None) == (kind == "gaussian")
    assert relative_error(w, q.dequantize(), None) < 0.97 * relative_error(w, q4_0(w), None)
    loaded = QuantizedWeight.from_tensors(q.to_tensors("layer"), "layer")
    assert torch.equal(loaded.dequantize(), q.dequantize()) and (loaded.zero is None) == (q.zero is None)


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_equal_numbers_are_exact_and_finite(value):
    w = make(8, 64)
    w[3] = value
    for q in (rounding.round_to_nearest(w, 4, 32), rounding.clip(w, 4, 32), rounding.clip(w, 4, 32, seen(w).rows)):
        assert torch.equal(q.dequantize()[3], w[3]) and (q.scale != 0).all()
    zero = torch.zeros(8, 64)
    assert torch.equal(rounding.channelwise(zero).dequantize(), zero)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 3])
def test_awq_is_never_worse_than_nearest_on_its_own_objective(shape, bits):
    w = make(*shape)
    stats = seen(w)
    nearest = relative_error(w, rounding.round_to_nearest(w, bits, 32).dequantize(), stats)
    scaled = relative_error(w, awq.scale_search(w, stats, bits, 32).dequantize(), stats)
    both = relative_error(w, awq.awq(w, stats, bits, 32).dequantize(), stats)
    clipped = relative_error(w, rounding.clip(w, bits, 32, stats.rows).dequantize(), stats)
    assert scaled < 0.9 * nearest and both <= clipped * 1.0001 and both < scaled
    even = seen(w, outliers=False)  # nothing to gain; and nothing lost
    assert relative_error(w, awq.scale_search(w, even, bits, 32).dequantize(), even) <= 1.0001 * relative_error(
        w, rounding.round_to_nearest(w, bits, 32).dequantize(), even
    )


def test_awq_without_activity_stays_finite():
    w = make(8, 64)
    rows = torch.zeros(16, 64)
    q = awq.awq(w, LayerStats(torch.zeros(64), rows), 4, 32)
    assert q.dequantize().isfinite().all() and relative_error(w, q.dequantize(), None) < 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_the_branch_is_exact_at_full_rank(shape):
    w = make(*shape)
    full = min(to_matrix(w).shape)
    q = lowrank.svd(w, 4, 32, full)
    assert relative_error(w, q.dequantize(), None) < 2e-3  # fp16 factors
    up, down = lowrank.factors(to_matrix(w), full, torch.Generator().manual_seed(0))
    torch.testing.assert_close(up @ down, to_matrix(w), rtol=1e-4, atol=1e-5)


def test_the_branch_finds_the_best_rank():
    g = torch.Generator().manual_seed(0)
    low = torch.randn(40, 4, generator=g) @ torch.randn(4, 64, generator=g)
    w = low + 0.01 * torch.randn(40, 64, generator=g)
    up, down = lowrank.factors(w, 4, g)
    best = torch.linalg.svdvals(w)[4:].norm()
    assert (w - up @ down).norm() < 1.001 * best


@pytest.mark.parametrize("shape", SHAPES)
def test_a_branch_helps_and_repeats_by_seed(shape):
    w = make(*shape)
    stats = seen(w)
    a, b = (lowrank.svd(w, 4, 32, 4, stats, seed=5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.fields().values(), b.fields().values()))
    assert a.down.shape == (4, *shape[1:]) and a.up.shape == (shape[0], 4)
    assert relative_error(w, a.dequantize(), stats) < relative_error(w, awq.awq(w, stats, 4, 32).dequantize(), stats)
    plain = relative_error(w, rounding.clip(w, 4, 32).dequantize(), None)
    assert relative_error(w, lowrank.svd(w, 4, 32, 4).dequantize(), None) < plain


@pytest.mark.parametrize("shape", SHAPES)
def test_w8a8_is_near_lossless_and_smoothing_helps(shape):
    w = make(*shape)
    stats = seen(w)
    norm = (stats.rows @ to_matrix(w).t()).square().mean()
    plain = smooth.smoothquant(w, None)
    found = smooth.smoothquant(w, stats)
    assert plain.int8_activations and found.int8_activations and found.scale.shape == (1, shape[0])
    assert smooth.w8a8_error(found, w, stats) < 0.02**2 * norm
    assert smooth.w8a8_error(found, w, stats) <= smooth.w8a8_error(plain, w, stats)
    fixed = smooth.smoothquant(w, stats, alpha=0.5)
    assert smooth.w8a8_error(found, w, stats) <= smooth.w8a8_error(fixed, w, stats)


def test_smoothing_evens_inputs_out_as_the_paper_says():
    w = make(16, 64)
    stats = seen(w)
    q = smooth.smoothed(w, stats, 0.5)
    even = stats.peak * q.pre_quant_scale.float()
    largest = (w / q.pre_quant_scale.float()).abs().amax(0)
    torch.testing.assert_close(
        even / largest, torch.full((64,), (even / largest)[0].item()), rtol=5e-3, atol=0
    )  # eq. 4


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_alpha_is_searched_by_the_error_that_the_kernels_make(kind):
    """On inputs with few negative numbers, where 127 steps either side of 0 would be twice as coarse as 256 codes."""
    from distill.packed import cpu

    x = torch.nn.functional.silu(4 * make(1, 64, 9, 9, seed=2) * 8)
    if kind == "conv":
        w = make(32, 64, 3, 3)
        module = torch.nn.Conv2d(64, 32, 3, padding=1, bias=False)
    else:
        w, x = make(32, 64), x.flatten(2)[0].t().contiguous()
        module = torch.nn.Linear(64, 32, bias=False)
    module.weight.data = w
    stats = collect(module, {"": "layer"}, lambda: module(x), rows=4096)["layer"]
    for alpha in (0.0, 0.5):
        q = smooth.smoothed(w, stats, alpha)
        pre = q.pre_quant_scale.float()
        if kind == "conv":
            y = cpu.int8_conv(q, x * pre.view(-1, 1, 1), None, (1, 1), (1, 1, 1, 1), (1, 1))[0]
        else:
            y = cpu.int8_linear(q, x * pre, None)[0]
        made = (y - module(x)).square().mean().item()
        assert smooth.w8a8_error(q, w, stats) == pytest.approx(made, rel=1e-3)
