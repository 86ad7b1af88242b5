"""The benchmark: its statistics against scipy-free truths, its times against a clock that is known, its face."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill import bench

PARTS = {"sleep": lambda seconds: time.sleep(seconds) or seconds, "add": lambda seconds: seconds + 1}


@pytest.mark.parametrize("p", bench.PERCENTILES)
def test_a_percentile_s_range_holds_it_as_often_as_it_says(p):
    """Exponential times, whose percentiles are known: of 400 runs of 60 queries at least 93 in 100 hold it."""
    g, true, held = torch.Generator().manual_seed(p), -math.log(1 - p / 100), 0
    for times in -torch.rand(400, 60, generator=g).clamp_min(1e-9).log():
        low, high = bench.percentile_range(times.tolist(), p)
        held += (low is None or low <= true) and (high is None or true <= high)
    assert held >= 0.93 * 400


def test_too_few_queries_bound_no_high_percentile():
    """0.99^n > 1/40 up to n = 367: the largest time may still lie below the percentile."""
    times = [float(i) for i in range(368)]
    assert bench.percentile_range(times[:367], 99)[1] is None
    assert bench.percentile_range(times, 99)[1] == 367.0
    assert bench.percentile_range(times[:30], 50) == (9.0, 20.0)  # ranks 10 and 21: Conover's table A3 for n = 30
    assert [bench.percentile(times[:10], p) for p in (50, 90, 99)] == [4.0, 8.0, 9.0]


def test_parts_are_timed_apart_and_warming_up_is_not():
    told, asked = [], []

    def query(number: int, pictures: int) -> float:
        asked.append((number, pictures))
        return 0.2 if len(asked) <= 2 else 0.01 * pictures

    counts = {"queries": 5, "batches": 2, "batch": 3, "warmup": 2, "seed": 4}
    report = bench.measure("naps", PARTS, query, **counts, told=lambda *a: told.append(a))
    assert asked == [*[(n, 1) for n in (4, 4, 4, 5, 6, 7, 8)], *[(n, 3) for n in (4, 4, 4, 5)]]
    assert {k: len(v) for k, v in report.single.items()} == {"sleep": 5, "add": 5, bench.TOTAL: 5}
    assert 0.009 < bench.percentile(report.single["sleep"], 50) < 0.1 and max(report.single["add"]) < 0.009
    rate = bench.rate_of(report.offline["sleep"], 3)
    assert rate["n"] == 2 and rate["range"][0] <= rate["rate"] <= rate["range"][1] < 101
    assert told[0] == ("single stream", 0.0) and {what for what, _ in told} == {"single stream", "offline"}
    data = json.loads(report.to_json())
    assert data["latency"]["sleep"]["n"] == 5 and data["machine"]["torch"] == torch.__version__
    lines = [line for line in bench.table(report).splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert "?" in lines[-1], "five queries bound no p99"
    assert len(bench.plot(report).getcolors(100_000)) > 3


def test_the_command_writes_table_json_and_plot(tmp_path, monkeypatch, capsys):
    from distill.cli import main

    monkeypatch.chdir(tmp_path)
    words = "bench student --queries 3 --batches 2 --batch 2 --warmup 1 --plot new/times.png --device cpu".split()
    assert main(words) == 0
    out = capsys.readouterr().out
    for part in ("text encoder", "network", "autoencoder", bench.TOTAL):
        assert f"| {part} " in out
    data = json.loads(Path("bench.json").read_text())
    assert data["about"]["steps"] == 1 and data["latency"]["network"]["n"] == 3
    assert Image.open("new/times.png").size[0] > 100
