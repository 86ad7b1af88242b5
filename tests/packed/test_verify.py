"""Which way of computing is taken: integers or floats, the faster of the right ones, never a wrong one."""

import logging

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error, weight

from distill.packed import cpu, cuda, dispatch, unpack, verify
from distill.packed.weight import QuantizedWeight
from distill.quantize.rounding import round_to_nearest

pytestmark = pytest.mark.usefixtures("small_cases_count")


def test_auto_is_int8_for_many_even_rows_and_float_otherwise():
    w, x = weight("4 bits", 64, 128), torch.randn(64, 128)
    float_, int8 = (dispatch.linear(w, x, None, a) for a in ("float", "int8"))
    assert not torch.equal(float_, int8)
    assert torch.equal(dispatch.linear(w, x, None), int8)
    few = x[: dispatch.FEW]
    assert torch.equal(dispatch.linear(w, few, None), dispatch.linear(w, few, None, "float"))
    x[:, 5] *= 1000  # an outlier channel that the weights ignore: all that counts would be rounded away
    w = QuantizedWeight(**(vars(w) | {"codes": w.codes.clone(), "zero": None}))
    w.codes[:, 2] = w.codes[:, 2] & 15 | -128  # 8 in its high nibble
    assert w.matrix()[:, 5].abs().max() == 0
    assert torch.equal(dispatch.linear(w, x, None), dispatch.linear(w, x, None, "float"))
    image = torch.randn(1, 16, 8, 8)
    v = weight("no zero", 24, 16, 3, 3, group=16)
    args = (None, (1, 1), (1, 1), (1, 1), 1)
    assert torch.equal(dispatch.conv2d(v, image, *args), dispatch.conv2d(v, image, *args, "int8"))
    image[0, 3] *= 1000
    v.codes[:, 1::8] = v.codes[:, 1::8] & 15 | -128
    assert v.dequantize()[:, 3].abs().max() == 0
    assert torch.equal(dispatch.conv2d(v, image, *args), dispatch.conv2d(v, image, *args, "float"))


def test_auto_leaves_weights_alone_whose_rows_do_not_fit_int8():
    dense = torch.randn(64, 1024)
    dense[:, 7] *= 100
    w, x = round_to_nearest(dense, 4, 16), torch.randn(64, 1024)
    assert unpack.coarseness(w) > dispatch.COARSE > 2 * unpack.coarseness(weight("4 bits", 64, 128))
    assert torch.equal(dispatch.linear(w, x, None), dispatch.linear(w, x, None, "float"))


def wrong_from(columns):
    def compute(w, x, bias):
        y = F.linear(x, w.matrix(), bias)
        y[:, columns:] *= 1.5
        return y

    return compute


@pytest.mark.parametrize("compute, words", [
    (wrong_from(0), "relative error 0.5"),
    (wrong_from(30), "relative error"),
    (lambda w, x, bias: x.new_full((len(x), w.out_features), float("nan")), "relative error nan"),
    (lambda w, x, bias: x[:, :60] @ w.matrix().t(), "it fails"),
])  # fmt: skip
def test_a_wrong_kernel_is_refused_aloud_and_plain_serves(compute, words, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "float_linear", lambda w, x, bias, multiply: compute(w, x, bias))
    monkeypatch.setattr(cpu, "multipliers", lambda: {"float": F.linear})
    w, x = weight("4 bits", 48, 64), torch.randn(20, 64)
    with caplog.at_level(logging.WARNING):
        y = dispatch.linear(w, x, None, "float")
    assert torch.equal(y, F.linear(x, w.matrix()))
    assert words in caplog.text and "(48, 64)" in caplog.text and "float kernel" in caplog.text
    caplog.clear()
    dispatch.linear(w, x, None, "float")
    assert not caplog.text  # once is enough


def test_wrong_integers_give_way_to_floats(monkeypatch, caplog):
    right = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: right(a, b, out=out).add_(100_000))
    w, x = weight("4 bits", 48, 64), torch.randn(40, 64)
    assert error(dispatch.linear(w, x, None), F.linear(x, w.matrix())) < 2e-6
    assert "int8 kernel is not used" in caplog.text


def test_of_two_right_ways_the_faster_is_taken(monkeypatch):
    times = iter([3.0, 2.0])
    monkeypatch.setattr(verify, "seconds", lambda run, n: next(times))
    plain = lambda w, x, bias: F.linear(x, w.matrix(), bias)  # noqa: E731
    slow, fast = (lambda w, x, b: plain(w, x, b)), (lambda w, x, b: plain(w, x, b))
    found = verify.way("t", {"slow": slow, "fast": fast}, plain, weight("4 bits", 8, 64), torch.randn(9, 64), 1, 1e-4)
    assert found is fast


def test_what_was_run_before_changes_nothing():
    """A first image that is strange must not decide how the next one is computed."""
    w, x = weight("4 bits", 64, 128), torch.randn(64, 128)
    fresh = dispatch.linear(w, x, None)
    verify.forget()
    dispatch.linear(w, torch.full_like(x, float("nan")), None)
    assert torch.equal(dispatch.linear(w, x, None), fresh)


def test_comfy_kitchen_is_asked_only_for_what_it_has():
    w = weight("4 bits", 48, 128)
    assert not cuda.applies(w, torch.randn(5, 128))
    assert not cuda.applies(w, torch.randn(5, 128).half())
    meta = torch.empty(5, 128, dtype=torch.float16, device="meta")
    assert not cuda.applies(w, meta) and not cuda.applies(weight("8 bits", 48, 128), meta)
