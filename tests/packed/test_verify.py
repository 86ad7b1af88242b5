"""Which way of computing is taken: integers or floats, the first right one, never a wrong one."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error, generator, weight

from distill.packed import cpu, cuda, dispatch, unpack, verify
from distill.packed.weight import QuantizedWeight
from distill.quantize.rounding import round_to_nearest

pytestmark = pytest.mark.usefixtures("small_cases_count")


def test_auto_is_int8_for_many_even_rows_and_float_otherwise():
    w, x = weight("4 bits", 64, 128), torch.randn(64, 128, generator=generator())
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
    image = torch.randn(1, 16, 8, 8, generator=generator())
    v = weight("no zero", 24, 16, 3, 3, group=16)
    args = (None, (1, 1), (1, 1), (1, 1), 1)
    assert torch.equal(dispatch.conv2d(v, image, *args), dispatch.conv2d(v, image, *args, "int8"))
    image[0, 3] *= 1000
    v.codes[:, 1::8] = v.codes[:, 1::8] & 15 | -128
    assert v.dequantize()[:, 3].abs().max() == 0
    assert torch.equal(dispatch.conv2d(v, image, *args), dispatch.conv2d(v, image, *args, "float"))


def test_auto_leaves_weights_alone_whose_rows_do_not_fit_int8():
    dense = torch.randn(64, 1024, generator=generator())
    dense[:, 7] *= 100
    w, x = round_to_nearest(dense, 4, 16), torch.randn(64, 1024, generator=generator())
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
    w, x = weight("4 bits", 48, 64), torch.randn(20, 64, generator=generator())
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
    w, x = weight("4 bits", 48, 64), torch.randn(40, 64, generator=generator())
    assert error(dispatch.linear(w, x, None), F.linear(x, w.matrix())) < 2e-6
    assert "int8 kernel is not used" in caplog.text


def test_the_first_right_way_is_taken(caplog):
    plain = lambda w, x, bias: F.linear(x, w.matrix(), bias)  # noqa: E731
    first, second = (lambda w, x, b: plain(w, x, b)), (lambda w, x, b: plain(w, x, b))
    w, x = weight("4 bits", 8, 64), torch.randn(9, 64, generator=generator())
    assert verify.way("a", {"first": first, "second": second}, plain, w, x, 1, 1e-4) is first
    assert verify.way("b", {"wrong": wrong_from(0), "second": second}, plain, w, x, 1, 1e-4) is second
    assert "wrong kernel is not used" in caplog.text


BITS = """
import hashlib, sys, torch
sys.path.insert(0, {folder!r})
torch.manual_seed(int(sys.argv[1]))
from kernel_cases import weight
from distill.packed import dispatch
seen = hashlib.sha256()
g = torch.Generator().manual_seed(0)
for n, k, rows in ((64, 128, 7), (320, 320, 1024), (640, 1280, 256)):
    x = torch.randn(rows, k, generator=g)
    seen.update(dispatch.linear(weight("4 bits", n, k, seed=1), x, None).numpy().tobytes())
for c, size in ((64, 16), (320, 8)):
    x = torch.randn(2, c, size, size, generator=g)
    y = dispatch.conv2d(weight("4 bits", c, c, 3, 3, group=64, seed=1), x, None, (1, 1), (1, 1), (1, 1), 1)
    seen.update(y.contiguous().numpy().tobytes())
print(seen.hexdigest())
"""


def test_every_process_computes_the_same_bits():
    """Whatever else the machine does: two at once, and one more by itself."""
    code = BITS.format(folder=str(Path(__file__).parent))
    command, env = [sys.executable, "-c", code], os.environ | {"OMP_NUM_THREADS": "1"}
    two = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=env) for i in (1, 2)]
    found = {process.communicate(timeout=120)[0] for process in two}
    found.add(subprocess.run([*command, "3"], capture_output=True, text=True, env=env, timeout=120).stdout)
    assert len(found) == 1 and len(found.pop()) == 65


def test_what_was_run_before_changes_nothing():
    """A first image that is strange must not decide how the next one is computed."""
    w, x = weight("4 bits", 64, 128), torch.randn(64, 128, generator=generator())
    fresh = dispatch.linear(w, x, None)
    verify.forget()
    dispatch.linear(w, torch.full_like(x, float("nan")), None)
    assert torch.equal(dispatch.linear(w, x, None), fresh)


def test_a_kernel_that_is_wrong_for_one_number_of_rows_serves_the_others(monkeypatch, caplog):
    """Whichever comes first."""
    kernel, used = cpu.float_linear, []

    def sometimes(w, x, bias, multiply):
        used.append(len(x))
        return kernel(w, x, bias, multiply) * (1.5 if len(x) == 20 else 1)

    monkeypatch.setattr(cpu, "float_linear", sometimes)
    monkeypatch.setattr(cpu, "multipliers", lambda: {"float": F.linear})
    w, x = weight("4 bits", 48, 64), torch.randn(22, 64, generator=generator())
    for order in ((20, 22), (22, 20)):
        verify.forget(), used.clear()
        found = {rows: dispatch.linear(w, x[:rows], None, "float") for rows in order}
        assert torch.equal(found[20], F.linear(x[:20], w.matrix()))
        assert sorted(used) == [20, 22, 22]  # both were tried, and 22 taken


def test_comfy_kitchen_is_asked_only_for_what_it_has():
    w = weight("4 bits", 48, 128)
    assert not cuda.applies(w, torch.randn(5, 128, generator=generator()))
    assert not cuda.applies(w, torch.randn(5, 128, generator=generator()).half())
    meta = torch.empty(5, 128, dtype=torch.float16, device="meta")
    assert not cuda.applies(w, meta) and not cuda.applies(weight("8 bits", 48, 128), meta)
