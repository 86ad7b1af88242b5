"""How long a model takes, measured as MLPerf Inference does: latency of a single stream, throughput offline.

Single stream: queries of one picture come one after the other, each when the one before is done; what counts are the
percentiles of their times. Offline: batches of many pictures as fast as they go; what counts is pictures a second. Both
for the text encoder, the network and the autoencoder apart. Every figure stands with the range it is known to.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

PERCENTILES = (50, 90, 99)
CONFIDENCE = 0.95
TOTAL = "whole picture"
Chain = Mapping[str, Callable[[Any], Any]]
"""part -> what it does, in order: each takes what the one before gave, the first the query"""
Query = Callable[[int, int], Any]
"""(number of the query, pictures) -> what the first part takes; not timed"""


@dataclass(frozen=True)
class Report:
    """What was measured, where and how."""

    model: str
    single: dict[str, list[float]]
    """part -> seconds of each query, in order"""
    offline: dict[str, list[float]]
    """part -> seconds of each batch"""
    batch: int
    """pictures in a batch"""
    warmup: int
    """queries, and batches, before the first that was timed"""
    seed: int
    """of the first query's noise; the next one's is one more"""
    machine: dict[str, Any]
    about: dict[str, Any]
    """what the caller knows: steps, size, numbers' type"""

    def to_json(self) -> str:
        """Every time that was taken, and the figures of the table."""
        figures = {part: figures_of(times) for part, times in self.single.items()}
        rates = {part: rate_of(times, self.batch) for part, times in self.offline.items()}
        return json.dumps(asdict(self) | {"latency": figures, "throughput": rates}, indent=1) + "\n"


def measure(
    model: str, parts: Chain, query: Query, *, queries: int = 100, batches: int = 10, batch: int = 8, warmup: int = 5,
    seed: int = 0, device: torch.device | str = "cpu", about: Mapping[str, Any] | None = None,
    told: Callable[[str, float], Any] = lambda what, share: None,
) -> Report:  # fmt: skip
    """Time a chain of parts. told(what, share) is called between the queries, where it may also raise.

    A GPU is waited for before and after each part, so that a part's time is its own.
    """
    device = torch.device(device)

    def times(what: str, count: int, pictures: int) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {name: [] for name in (*parts, TOTAL)}
        for i in range(-warmup, count):
            told(what, (i + warmup) / (count + warmup))
            value, whole = query(seed + max(i, 0), pictures), 0.0
            for name, part in parts.items():
                wait_for(device)
                start = time.perf_counter()
                value = part(value)
                wait_for(device)
                seconds = time.perf_counter() - start
                whole += seconds
                if i >= 0:
                    taken[name].append(seconds)
            if i >= 0:
                taken[TOTAL].append(whole)
        return taken

    single, offline = times("single stream", queries, 1), times("offline", batches, batch)
    return Report(model, single, offline, batch, warmup, seed, machine(device), dict(about or {}))


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on beside the model."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif platform.system() == "Linux":
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
        name = names[0] if names else name
    return {
        "device": device.type, "name": name, "threads": torch.get_num_threads(), "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the figures


def percentile(times: list[float], p: float) -> float:
    """The smallest time that p % of them do not exceed (nearest rank, as MLPerf's)."""
    return sorted(times)[max(0, math.ceil(p / 100 * len(times)) - 1)]


def percentile_range(times: list[float], p: float) -> tuple[float | None, float | None]:
    """Between which of the times the p-th percentile of all times to come lies, with CONFIDENCE; None where so few
    cannot bound it. Assumes that queries do not depend on each other, and nothing about how times are distributed.

    Of n times a binomial number K ~ B(n, p) lies below the percentile, so it is between the l-th and the u-th of them
    where P(K < l) and P(K >= u) are half of what is left each (Hahn and Meeker 1991, section 5.2).
    """
    n, q, tail, below = len(times), p / 100, (1 - CONFIDENCE) / 2, 0.0
    ordered, low, high = sorted(times), None, None
    for k in range(n):
        log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        below += math.exp(log + k * math.log(q) + (n - k) * math.log1p(-q))  # P(K <= k)
        if below <= tail:
            low = ordered[k]
        if high is None and below >= 1 - tail:
            high = ordered[k]
    return low, high


def figures_of(times: list[float]) -> dict[str, Any]:
    """Percentiles in seconds, each with its range, and of how many queries."""
    found: dict[str, Any] = {"n": len(times)}
    for p in PERCENTILES:
        found |= {f"p{p}": percentile(times, p), f"p{p}_range": percentile_range(times, p)}
    return found


def rate_of(times: list[float], batch: int) -> dict[str, Any]:
    """Pictures a second over all batches, and in the slowest and the fastest of them."""
    rates = [batch / t for t in times]
    return {"n": len(times), "rate": batch * len(times) / sum(times), "range": (min(rates), max(rates))}


def table(report: Report) -> str:
    """Markdown, aligned."""
    queries, batches = (len(next(iter(times.values()))) for times in (report.single, report.offline))
    head = ["part", *(f"p{p} [ms]" for p in PERCENTILES), f"pictures/s, batches of {report.batch}"]
    rows = [head]
    for part, times in report.single.items():
        f, rate = figures_of(times), rate_of(report.offline[part], report.batch)
        cells = [f"{1000 * f[f'p{p}']:.4g} ({ms(f[f'p{p}_range'])})" for p in PERCENTILES]
        rows.append([part, *cells, f"{rate['rate']:.4g} ({rate['range'][0]:.4g} to {rate['range'][1]:.4g})"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|-" + "-|-".join("-" * w for w in widths) + "-|")
    m, about = report.machine, ", ".join(f"{k} {v}" for k, v in report.about.items())
    return "\n".join([
        f"{report.model} ({about})",
        f"{m['name']}, {m['device']}, {m['threads']} threads, torch {m['torch']}; seed {report.seed}",
        "", *lines, "",
        f"Latency: one picture at a time, {queries} queries after {report.warmup} to warm up; in brackets the range of",
        f"each percentile with {100 * CONFIDENCE:.0f} % confidence (?: too few queries). "
        f"Throughput: {batches} batches, in brackets the slowest and the fastest.",
    ])  # fmt: skip


def ms(bounds: tuple[float | None, float | None]) -> str:
    return " to ".join("?" if b is None else f"{1000 * b:.4g}" for b in bounds)


def plot(report: Report, width: int = 900) -> Image:
    """Each query's time as a point, a row for each part, with marks at the percentiles."""
    from PIL import Image, ImageDraw, ImageFont

    left, row, top = 150, 90, 60
    height = top + row * len(report.single) + 50
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    most = max(max(times) for times in report.single.values())
    step = 10 ** math.floor(math.log10(most))
    step = next(step / d for d in (1, 2, 5, 10) if most / (step / d) >= 4)

    def at(seconds: float) -> float:
        return left + (width - left - 40) * seconds / most

    for i in range(int(most / step) + 1):
        draw.line([at(i * step), top - 10, at(i * step), height - 45], fill="#ddd")
        draw.text((at(i * step), height - 40), f"{1000 * i * step:g}", "#444", font, anchor="ma")
    draw.text((width - 30, height - 20), "ms for one picture", "#444", font, anchor="ra")
    draw.text(
        (left, 12), f"{report.model}: {report.machine['name']}, {report.machine['threads']} threads", "black", font
    )
    for r, (part, times) in enumerate(report.single.items()):
        y = top + row * r
        draw.text((left - 12, y + 20), part, "black", font, anchor="ra")
        for i, seconds in enumerate(times):  # in the order they came, from top to bottom
            x, dy = at(seconds), 40 * i / len(times)
            draw.ellipse([x - 2, y + dy - 2, x + 2, y + dy + 2], fill="#3b7dd8")
        last = 0.0
        for p in PERCENTILES:
            x = at(percentile(times, p))
            draw.line([x, y - 6, x, y + 46], fill="#c0392b", width=2)
            if x > last + 30:
                draw.text((x, y + 48), f"p{p}", "#c0392b", font, anchor="ma")
                last = x
    return picture
