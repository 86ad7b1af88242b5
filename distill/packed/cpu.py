"""Linear and convolution on the CPU with eager torch: fp32 activations, or int8 ones through `torch._int_mm`.

All take and give fp32; x is 2-D or channels-last inside. Nothing here applies pre_quant_scale or the low-rank branch.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .buffers import result, scratch
from .unpack import dense, integer, norm
from .weight import QuantizedWeight

WEIGHTS = 1 << 22
"""fp32 weights unpacked for one multiplication: 16 MB"""
PATCHES = 1 << 22
"""numbers of a convolution's patches cut out for one multiplication"""
OUTPUTS = 1 << 20
"""int32 results of one multiplication: they stay in the cache until they are scaled"""
ROUNDED = 1 << 18
"""numbers rounded to int8 at once"""

Pair = tuple[int, int]
Pads = tuple[int, int, int, int]  # left, right, top, bottom
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # F.linear's arguments and result


# ------------------------------------------------------------------------------------------------ fp32 activations


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear through oneDNN in place of torch's BLAS: MKL leaves half of an AMD processor's AVX512 unused."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def multipliers() -> dict[str, Multiply]:
    """What this torch can multiply fp32 matrices with, the fastest first: oneDNN (on an AMD EPYC as fast or faster at
    all shapes of SD1.5), but MKL on Intel's own. The operation is not public, so it may be missing one day."""
    found = {"float": F.linear}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found = found | {"oneDNN float": onednn} if is_intel() else {"oneDNN float": onednn} | found
    return found


@functools.cache
def is_intel() -> bool:
    """Whether the processor is Intel's, as far as the system says."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(errors="replace")[:4096]
    except OSError:
        return "GenuineIntel" in platform.processor()


def float_linear(w: QuantizedWeight, x: Tensor, bias: Tensor | None, multiply: Multiply = F.linear) -> Tensor:
    """x (M, K) -> (M, N)"""
    n, rows = w.out_features, max(1, min(w.out_features, WEIGHTS // w.in_features))
    part = scratch("dense", (rows, w.in_features), torch.float32)
    if rows == n:
        return multiply(x, dense(w, 0, n, part), bias)
    y = result(len(x), n)
    for i in range(0, n, rows):
        j = min(n, i + rows)
        y[:, i:j] = multiply(x, dense(w, i, j, part[: j - i]), None if bias is None else bias[i:j])
    return y


def float_conv(w: QuantizedWeight, x: Tensor, bias: Tensor | None, stride: Pair, pads: Pads, dilation: Pair) -> Tensor:
    """x (B, C, H, W) -> (B, N, H', W'), channels-last. torch's own convolution, some output channels at a time."""
    x, padding = padded(x, pads)
    n, rows = w.out_features, max(1, min(w.out_features, WEIGHTS // w.in_features))
    part = scratch("dense", (rows, w.in_features), torch.float32)
    if rows == n:
        return F.conv2d(x, w.unrolled(dense(w, 0, n, part)), bias, stride, padding, dilation)
    x, y = x.contiguous(memory_format=torch.channels_last), None
    for i in range(0, n, rows):
        j = min(n, i + rows)
        weight = w.unrolled(dense(w, i, j, part[: j - i]))
        some = F.conv2d(x, weight, None if bias is None else bias[i:j], stride, padding, dilation)
        if y is None:
            y = result(len(x), *some.shape[2:], n).permute(0, 3, 1, 2)
        y[:, i:j] = some
    return y


def padded(x: Tensor, pads: Pads) -> tuple[Tensor, tuple[int, int]]:
    """x and the padding that F.conv2d can do by itself."""
    left, right, top, bottom = pads
    return (x, (top, left)) if left == right and top == bottom else (F.pad(x, pads), (0, 0))


def windows(x: Tensor, shape: tuple[int, ...], stride: Pair, dilation: Pair) -> Tensor:
    """x (B, H, W, C), contiguous and padded -> a view (B, H', W', kh, kw, C): what each output pixel sees."""
    (kh, kw), (sh, sw), (dh, dw) = shape[2:], stride, dilation
    b, h, w, c = x.shape
    size = ((h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1)
    sb, sy, sx, sc = x.stride()
    if dw == 1:  # a row of the window is one piece of memory
        return x.as_strided((b, *size, kh, 1, kw * c), (sb, sy * sh, sx * sw, sy * dh, 0, sc))
    return x.as_strided((b, *size, kh, kw, c), (sb, sy * sh, sx * sw, sy * dh, sx * dw, sc))


# ------------------------------------------------------------------------------------------------ int8 activations


def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """zero and step of 256 codes, -128..127, from low to high and 0 among them: x is about step (code - zero)."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low).div_(255).clamp_(min=1e-30)
    return (low / -step - 128).round_(), step


def image_grids(x: Tensor) -> tuple[Tensor, Tensor]:
    """`grid` of each image's smallest and largest number: zero and step, both (B,)."""
    flat = (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).flatten(1)  # numbers in the order they lie in memory
    return grid(flat.amin(1), flat.amax(1))


def int8_linear(w: QuantizedWeight, x: Tensor, bias: Tensor | None) -> tuple[Tensor, float]:
    """x (M, K), each row in steps of 1/127 of its largest number -> (M, N), and its `rounding_error`"""
    m, n = len(x), w.out_features
    w8, w_step = integer(w)
    x8, step = round_rows(x)
    y, sizes = result(m, n), []
    rows = max(128, OUTPUTS // n)
    acc = scratch("acc", (min(m, rows), n), torch.int32)
    for i in range(0, m, rows):
        j = min(m, i + rows)
        torch._int_mm(x8[i:j], w8, out=acc[: j - i])
        part = y[i:j].copy_(acc[: j - i]).mul_(step[i:j])
        part.mul_(w_step) if bias is None else torch.addcmul(bias, part, w_step, out=part)
        sizes.append(torch.linalg.vector_norm(part))  # here, while it is in the cache
    return y, rounding_error(w, step.square_().sum(), sizes)


def int8_conv(
    w: QuantizedWeight, x: Tensor, bias: Tensor | None, stride: Pair, pads: Pads, dilation: Pair
) -> tuple[Tensor, float]:
    """x (B, C, H, W), each image in 255 steps -> (B, N, H', W') channels-last, and its `rounding_error`

    With q = code - 128 and o = the code of 0, x = step (q - o): y = step w_step (w8 q - o sum(w8)) + bias.
    """
    w8, w_step = integer(w)
    zero, step = image_grids(x)
    cut = windows(code_images(x, zero, step, pads), w.shape, stride, dilation)
    b, h, wd = cut.shape[:3]
    n = w.out_features
    total = torch._int_mm(w8.new_ones(1, w.in_features), w8).float()  # (1, N)
    scale = step[:, None] * w_step  # (B, N)
    offset = scale * total * -zero[:, None] + (0 if bias is None else bias)  # (B, N)
    y, sizes = result(b, h, wd, n), []
    for image, lines in pieces(b, h, wd * max(n, w.in_features * OUTPUTS // PATCHES)):
        view = cut[image, lines]
        if not view.is_contiguous():
            view = scratch("patches", tuple(view.shape), torch.int8).copy_(view)
        q = view.view(-1, w.in_features)
        acc = torch._int_mm(q, w8, out=scratch("acc", (len(q), n), torch.int32))
        part = y[image, lines]
        part.copy_(acc.view(part.shape))
        torch.addcmul(offset[image, None, None], part, scale[image, None, None], out=part)
        sizes.append(torch.linalg.vector_norm(part))
    return y.permute(0, 3, 1, 2), rounding_error(w, step.square_().sum() * (h * wd), sizes)


def rounding_error(w: QuantizedWeight, squares: Tensor, sizes: list[Tensor]) -> float:
    """Relative L2 error to expect of an output from rounding its input.

    squares: of the steps of the output's rows, summed up; sizes: L2 norms of its parts. Rounding to multiples of a step
    adds noise of variance step^2 / 12 to each input, and |w_n|^2 times that to output n.
    """
    noise = (squares / 12).sqrt_() * norm(w)
    return (noise / torch.linalg.vector_norm(torch.stack(sizes)).clamp_(min=1e-30)).item()


def pieces(images: int, lines: int, cost: int):
    """(slice of images, slice of lines): whole images, or lines of one, such that lines * cost is about OUTPUTS."""
    lines_at_once = max(1, OUTPUTS // cost)
    at_once = max(1, lines_at_once // lines)
    for b in range(0, images, at_once):
        step = lines if at_once > 1 or lines_at_once >= lines else lines_at_once
        for i in range(0, lines, step):
            yield slice(b, min(images, b + at_once)), slice(i, min(lines, i + step))


def round_images(x: Tensor) -> Tensor:
    """x (B, C, H, W) as `int8_conv` sees it: each image rounded to its 256 codes, in floats."""
    zero, step = image_grids(x)
    codes = code_images(x, zero, step, (0, 0, 0, 0)).float()
    view = (-1, 1, 1, 1)
    return ((codes - zero.view(view)) * step.view(view)).permute(0, 3, 1, 2)


def code_images(x: Tensor, zero: Tensor, step: Tensor, pads: Pads) -> Tensor:
    """x (B, C, H, W) -> (B, H + pads, W + pads, C) int8: round(x / step) + zero, its border the code of 0. Scratch."""
    left, right, top, bottom = pads
    b, c, h, w = x.shape
    out = scratch("x8", (b, h + top + bottom, w + left + right, c), torch.int8)
    zero, inverse = zero.view(b, 1, 1, 1), step.reciprocal().view(b, 1, 1, 1)
    if any(pads):
        out.copy_(zero.nan_to_num(0, 0, 0))
    inside = out[:, top : top + h, left : left + w]
    images = max(1, ROUNDED // (h * w * c))
    lines = max(1, ROUNDED // (w * c)) if images == 1 else h
    for i in range(0, b, images):
        part = x[i : i + images]
        if c > 1 and part.is_contiguous():  # torch transposes matrices 4 times faster than it permutes
            turned = scratch("image", (len(part), h * w, c), torch.float32)
            for image, source in zip(turned, part):
                image.copy_(source.view(c, -1).t())
            part = turned.view(-1, h, w, c)
        else:
            part = part.permute(0, 2, 3, 1)
        for j in range(0, h, lines):
            some = slice(j, j + lines)
            round_into(inside[i : i + images, some], part[:, some], inverse[i : i + images], zero[i : i + images])
    return out


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> int8 (scratch), and the step (M, 1) that makes each row's largest number 127."""
    m, k = x.shape
    out, step = scratch("x8", (m, k), torch.int8), x.new_empty(m, 1)
    rows = max(1, ROUNDED // k)
    for i in range(0, m, rows):
        part, s = x[i : i + rows], step[i : i + rows]
        torch.maximum(part.amax(1, keepdim=True), part.amin(1, keepdim=True).neg_(), out=s)
        round_into(out[i : i + rows], part, s.div_(127).clamp_(min=1e-30).reciprocal())
    return out, step


def round_into(out: Tensor, x: Tensor, inverse: Tensor, zero: Tensor | None = None) -> None:
    """out (R, ...) int8 = round(x * inverse) + zero"""
    wide = torch.mul(x, inverse, out=scratch("round", tuple(x.shape), torch.float32)).round_()
    if zero is not None:
        wide.add_(zero).clamp_(-128, 127)
    out.copy_(wide)
