"""Every way of computing on a quantized weight against plain dequantization, at the shapes that break kernels."""

import threading

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error, generator, weight

from distill.packed import buffers, cache, cpu, cuda, dispatch, unpack, verify
from distill.packed.layers import QuantConv2d, QuantLinear
from distill.packed.weight import QuantizedWeight, from_matrix, to_matrix
from distill.quantize.rounding import round_to_nearest

pytestmark = pytest.mark.usefixtures("small_cases_count")
KINDS = ["4 bits", "3 bits", "no zero", "8 bits", "8 bits in groups", "codebook", "everything", "flat"]
LINEAR = [  # rows' shape, K, N, group
    ((1,), 64, 24, 32),
    ((2, 19), 96, 40, 48),
    ((4, 16, 16), 160, 33, 32),
    ((300,), 36, 7, 36),
    ((17,), 512, 130, 16),
]
CONV = [  # x, N, kernel, group, arguments
    ((1, 32, 9, 7), 24, 3, 32, {"padding": 1}),
    ((2, 16, 16, 16), 40, 3, 16, {"padding": 1, "stride": 2}),
    ((2, 64, 5, 6), 33, 1, 64, {}),
    ((1, 16, 12, 10), 16, 3, 48, {"padding": 2, "dilation": 2}),
    ((3, 16, 11, 8), 20, (3, 1), 16, {"padding": (1, 0), "stride": (1, 2)}),
    ((1, 16, 10, 10), 16, 4, 64, {"padding": "same"}),
    ((1, 32, 8, 8), 24, 3, 32, {"padding": "valid"}),
    ((2, 16, 8, 8), 16, 3, 16, {"padding": 1, "groups": 2}),
]


@pytest.mark.parametrize("shape, k, n, group", LINEAR)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_that_of_the_dense_weight(kind, shape, k, n, group):
    w, x = weight(kind, n, k, group=group), torch.randn(*shape, k, generator=generator())
    bias = torch.randn(n, generator=generator())
    expected = F.linear(x, w.dequantize(), bias)
    assert error(dispatch.linear(w, x, bias, "float"), expected) < 2e-6
    assert error(dispatch.linear(w, x, None, "float"), expected - bias) < 2e-6
    assert error(dispatch.linear(w, x, bias, "int8"), expected) < 0.02


@pytest.mark.parametrize("shape, n, kernel, group, arguments", CONV)
@pytest.mark.parametrize("kind", KINDS)
def test_convolution_is_that_of_the_dense_weight(kind, shape, n, kernel, group, arguments):
    conv = torch.nn.Conv2d(shape[1], n, kernel, **arguments)
    w = weight(kind, *conv.weight.shape, group=group if arguments.get("groups", 1) == 1 else 8)
    layer = QuantConv2d(shape[1], n, kernel, **arguments)
    layer.set_quantized(w)
    layer.bias.data = conv.bias.data
    conv.weight.data = w.dequantize()
    for x in (
        torch.randn(shape, generator=generator()),
        torch.randn(shape, generator=generator()).contiguous(memory_format=torch.channels_last),
    ):
        with torch.no_grad():
            expected = conv(x)
            layer.activations = "float"
            assert error(layer(x), expected) < 2e-6
            assert error(layer(x[0]), expected[0]) < 2e-6
            layer.activations = "int8"
            assert error(layer(x), expected) < 0.02


@pytest.mark.parametrize("kind", ["4 bits", "flat"])
@pytest.mark.parametrize("shape, n, kernel, group, arguments", CONV[:-1])
def test_a_convolution_in_parts_is_the_whole(kind, shape, n, kernel, group, arguments, monkeypatch):
    conv = QuantConv2d(shape[1], n, kernel, **arguments)
    w, x = weight(kind, *conv.weight.shape, group=group), torch.randn(shape, generator=generator())
    pads = dispatch.pads_of(conv.padding, conv.kernel_size, conv.dilation)
    args = (w, x, conv.bias.data, conv.stride, pads, conv.dilation)
    whole = cpu.float_conv(*args)
    monkeypatch.setattr(cpu, "WEIGHTS", 3 * w.in_features)  # three output channels at a time
    parts = cpu.float_conv(*args)
    assert error(parts, whole) < 2e-6 and parts.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("block", [1, 1 << 10])
def test_work_cut_into_pieces_is_the_same_work(block, monkeypatch):
    w, x = weight("4 bits", 40, 32, 3, 3), torch.randn(3, 32, 12, 9, generator=generator())
    v, rows = weight("4 bits", 40, 96), torch.randn(300, 96, generator=generator())
    args = (None, (1, 1), (1, 1), (1, 1), 1)
    before = [dispatch.conv2d(w, x, *args, "int8"), dispatch.linear(v, rows, None, "int8")]
    before += [dispatch.conv2d(w, x, *args, "float"), dispatch.linear(v, rows, None, "float")]
    monkeypatch.setattr(unpack, "BLOCK", block)
    monkeypatch.setattr(cpu, "OUTPUTS", block)
    after = [dispatch.conv2d(w, x, *args, "int8"), dispatch.linear(v, rows, None, "int8")]
    after += [dispatch.conv2d(w, x, *args, "float"), dispatch.linear(v, rows, None, "float")]
    for a, b in zip(after, before):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ int8 activations


def test_int8_adds_little_to_the_error_of_four_bits():
    """The grids of W4A8 add below a twentieth to a layer's error."""
    dense, x = torch.randn(256, 640, generator=generator()), torch.randn(512, 640, generator=generator())
    w = round_to_nearest(dense, 4, 64)
    expected = F.linear(x, dense)
    plain, int8 = (error(dispatch.linear(w, x, None, a), expected) for a in ("float", "int8"))
    assert 0.05 < plain < 0.12 and int8 < 1.05 * plain
    dense = torch.randn(64, 64, 3, 3, generator=generator())
    image = F.silu(torch.randn(2, 64, 16, 16, generator=generator()))
    w = round_to_nearest(dense, 4, 64)
    expected = F.conv2d(image, dense, None, 1, 1)
    args = (w, image, None, (1, 1), (1, 1), (1, 1), 1)
    plain, int8 = (error(dispatch.conv2d(*args, a), expected) for a in ("float", "int8"))
    assert 0.05 < plain < 0.12 and int8 < 1.05 * plain


@pytest.mark.parametrize("kind", ["4 bits", "3 bits", "no zero", "8 bits", "8 bits in groups", "flat"])
def test_integer_weights_are_within_half_a_step(kind):
    w = weight(kind, 33, 64, 3, 3)
    w8, step = unpack.integer(w)
    off = (w8.t().float() * step[:, None] - to_matrix(w.dequantize())).abs() / step[:, None]
    most = 128 if w.bits == 8 else 15
    assert w8.dtype == torch.int8 and off.max() < 0.51 + most / 512  # both factors of 8.8 fixed point are rounded


def test_images_of_a_batch_do_not_see_each_other():
    w = weight("4 bits", 24, 16, 3, 3, group=16)
    x = torch.randn(3, 16, 8, 8, generator=generator())
    x[1] *= 100
    args = (None, (1, 1), (1, 1), (1, 1), 1, "int8")
    together = dispatch.conv2d(w, x, *args)
    for i in range(3):
        assert torch.equal(together[i : i + 1], dispatch.conv2d(w, x[i : i + 1], *args))


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan"), 1e36])
def test_strange_numbers_stay_where_floats_would_put_them(bad):
    """Zeros give the bias; the rows and images without the bad number are as they were."""
    w, bias = weight("4 bits", 24, 64), torch.randn(24, generator=generator())
    x = torch.randn(20, 64, generator=generator())
    good = dispatch.linear(w, x, bias, "int8")
    x[3] = 0 if bad == 0 else x[3]
    x[3, 5] = bad
    y = dispatch.linear(w, x, bias, "int8")
    assert torch.equal(y[:3], good[:3]) and torch.equal(y[4:], good[4:])
    assert y[3].isfinite().all() == (bad in (0.0, 1e36))
    if bad == 0:
        assert torch.equal(y[3], bias)
    v = weight("4 bits", 24, 16, 3, 3, group=16)
    image = torch.randn(2, 16, 6, 6, generator=generator())
    args = (bias, (1, 1), (1, 1), (1, 1), 1, "int8")
    good = dispatch.conv2d(v, image, *args)
    image[1] = 0 if bad == 0 else image[1]
    image[1, 0, 0, 0] = bad
    y = dispatch.conv2d(v, image, *args)
    assert torch.equal(y[0], good[0])
    assert bool(y[1].isfinite().all()) == (bad in (0.0, 1e36))
    if bad == 0:
        assert torch.allclose(y[1], bias[:, None, None].expand_as(y[1]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------ any input


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_inputs_in_any_memory_order(activations):
    w, x = weight("4 bits", 24, 64), torch.randn(64, 40, generator=generator()).t()
    assert torch.equal(dispatch.linear(w, x, None, activations), dispatch.linear(w, x.contiguous(), None, activations))
    v, image = (
        weight("4 bits", 24, 16, 3, 3, group=16),
        torch.randn(2, 8, 32, 9, generator=generator()).transpose(1, 3)[:, :, ::2, :],
    )
    image = torch.cat([image, image], 1)[:, :16]
    args = (None, (1, 1), (1, 1), (1, 1), 1, activations)
    for view in (image, image.flip(3), image[:, :, :, 1:]):
        assert error(dispatch.conv2d(v, view, *args), dispatch.conv2d(v, view.contiguous(), *args)) < 2e-6


@pytest.mark.parametrize("activations", ["auto", "float", "int8"])
def test_nothing_in_nothing_out(activations):
    assert dispatch.linear(weight("4 bits", 24, 64), torch.empty(0, 3, 64), torch.ones(24), activations).shape == (
        0,
        3,
        24,
    )
    args = (None, (1, 1), (1, 1), (1, 1), 1, activations)
    assert dispatch.conv2d(weight("4 bits", 24, 16, 3, 3, group=16), torch.empty(0, 16, 8, 8), *args).shape == (
        0,
        24,
        8,
        8,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_computed_in_fp32(dtype):
    w, x = weight("everything", 24, 64), torch.randn(40, 64, generator=generator()).to(dtype)
    y = dispatch.linear(w, x, None, "float")
    assert y.dtype == dtype and error(y.float(), F.linear(x.float(), w.dequantize())) < 4e-3
    v, image = weight("everything", 24, 16, 3, 3, group=16), torch.randn(1, 16, 8, 8, generator=generator()).to(dtype)
    y = dispatch.conv2d(v, image, None, (1, 1), (1, 1), (1, 1), 1, "float")
    assert y.dtype == dtype and error(y.float(), F.conv2d(image.float(), v.dequantize(), None, 1, 1)) < 4e-3


@pytest.mark.parametrize("activations", ["auto", "float", "int8"])
def test_gradients_reach_the_input(activations):
    layer = QuantLinear(64, 24)
    layer.set_quantized(weight("everything", 24, 64))
    layer.activations = activations
    x = torch.randn(40, 64, requires_grad=True, generator=generator())
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.get_quantized().dequantize().sum(0).expand_as(x), atol=1e-4)


def test_threads_do_not_share_buffers():
    w, v = weight("4 bits", 96, 256), weight("4 bits", 64, 32, 3, 3)
    rows, image = torch.randn(200, 256, generator=generator()), torch.randn(1, 32, 20, 20, generator=generator())
    args = (None, (1, 1), (1, 1), (1, 1), 1)
    work = [
        lambda: dispatch.linear(w, rows, None, "int8"),
        lambda: dispatch.conv2d(v, image, *args, "int8"),
        lambda: dispatch.linear(w, rows * 2, None, "float"),
        lambda: dispatch.conv2d(v, image * 2, *args, "float"),
    ]
    expected, wrong = [f() for f in work], []

    def repeat(f, y):
        wrong.extend(i for i in range(40) if not torch.equal(f(), y))

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(work, expected)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_inference_mode_leaves_nothing_behind_that_others_may_not_write(small, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", small)
    monkeypatch.setattr(dispatch, "WORTH", 1 << 25 if small else 0)
    buffers._buffers.__dict__.clear()
    w, x = weight("4 bits", 48, 64), torch.randn(30, 64, generator=generator())
    v, image = weight("4 bits", 64, 32, 3, 3), torch.randn(1, 32, 9, 9, generator=generator())

    def run():
        for activations in ("float", "int8"):
            yield dispatch.linear(w, x, None, activations)
            yield dispatch.conv2d(v, image, None, (1, 1), (1, 1), (1, 1), 1, activations)

    with torch.inference_mode():
        expected = list(run())
    for y, e in zip(run(), expected):
        assert torch.equal(y, e) and not y.is_inference()
    linear = torch.nn.Linear(48, 1)
    linear(next(run())).sum().backward()
    assert linear.weight.grad is not None


def test_big_buffers_are_not_kept(monkeypatch):
    monkeypatch.setattr(buffers, "KEPT", 1000)
    assert (
        buffers.scratch("test", (100,), torch.float32).data_ptr()
        == buffers.scratch("test", (10,), torch.int8).data_ptr()
    )
    buffers.scratch("test", (1000,), torch.float32)
    assert buffers._buffers.__dict__["test"].numel() == 400


def test_small_layers_are_dequantized_once(monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 10_000)
    monkeypatch.setattr(dispatch, "WORTH", 1 << 25)
    w, x = weight("everything", 24, 64), torch.randn(40, 64, generator=generator())
    v, image = weight("everything", 24, 16, 3, 3, group=16), torch.randn(2, 16, 8, 8, generator=generator())
    args = (None, (1, 1), (1, 1), (1, 1), 1, "float")
    for _ in range(2):
        assert torch.equal(dispatch.linear(w, x, None, "float"), F.linear(x, w.dequantize()))
        assert error(dispatch.conv2d(v, image, *args), F.conv2d(image, v.dequantize(), None, 1, 1)) < 2e-6
    assert cache.small_dense(w) is cache.small_dense(w) is not None
    assert error(dispatch.linear(w, x, None, "int8"), F.linear(x, w.dequantize())) > 1e-4  # asked for, so computed
    changed = QuantizedWeight(**(vars(w) | {"scale": w.scale * 2}))  # the same codes, another weight
    assert torch.equal(dispatch.linear(changed, x, None, "float"), F.linear(x, changed.dequantize()))
    before = len(cache._dense)
    del w, v, changed
    assert len(cache._dense) == before - 2  # what is kept lives as long as its codes


def test_small_layers_have_no_more_than_their_room(monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 10_000)
    monkeypatch.setattr(cache, "ROOM", sum(t.nbytes for _, t in cache._dense.values()) + 4 * 24 * 64)
    first, second = weight("4 bits", 24, 64), weight("4 bits", 24, 64)
    assert cache.small_dense(first) is cache.small_dense(first)
    assert cache.small_dense(second) is not cache.small_dense(second)  # made anew each time, to give the same bits
    monkeypatch.setattr(dispatch, "WORTH", 1 << 25)
    x = torch.randn(40, 64, generator=generator())
    assert torch.equal(dispatch.linear(second, x, None, "float"), dispatch.linear(first, x, None, "float"))


def test_large_results_are_ordinary_tensors(monkeypatch):
    monkeypatch.setattr(buffers, "MAPPED", 1 << 20)
    y = buffers.result(1000, 1001)
    y.fill_(2)
    assert y.shape == (1000, 1001) and y.is_contiguous() and y.sum() == 2 * 1000 * 1001
    monkeypatch.setattr(buffers, "_madvise", lambda: None)  # another system
    assert buffers.result(1000, 1001).shape == (1000, 1001)


def test_the_expected_rounding_error_is_the_one_found():
    def int8_weight(w):  # so that only the input is rounded beside it
        w8, step = unpack.integer(w)
        return from_matrix(w8.t().float() * step[:, None], w.shape)

    w, x = weight("4 bits", 64, 512), torch.randn(256, 512, generator=generator())
    y, expected = cpu.int8_linear(w, x, None)
    assert 0.95 < error(y, F.linear(x, int8_weight(w))) / expected < 1.05
    image, v = torch.randn(2, 32, 12, 12, generator=generator()), weight("4 bits", 64, 32, 3, 3)
    y, expected = cpu.int8_conv(v, image, None, (1, 1), (0, 0, 0, 0), (1, 1))
    assert 0.95 < error(y, F.conv2d(image, int8_weight(v))) / expected < 1.05
    assert abs(unpack.norm(w) / w.matrix().norm().item() - 1) < 1e-5


def test_comfy_kitchens_kernel_agrees_on_the_cpu():
    """Its eager backend is the oracle for how we call it; the GPU's takes the same arguments."""
    if cuda.module() is None:
        pytest.skip("comfy-kitchen is not installed")
    for kind in ("4 bits", "no zero", "3 bits"):
        w, x = weight(kind, 48, 128), torch.randn(5, 128, generator=generator())
        y = cuda.linear(w, x.half(), torch.ones(48).half()).float()
        assert error(y, F.linear(x, w.matrix()) + 1) < verify.HALF
