"""What a run tells: log.csv, TensorBoard, the coach's health."""

import csv
from dataclasses import replace

import pytest
from small_runs import TINY, batches, build, run

from distill.training import store
from distill.training.loop import train


def read(out):
    with (out / "log.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_csv_and_tensorboard_hold_the_coachs_health(tmp_path):
    steps = list(train(build("lora", coach_warmup=4), batches, TINY, tmp_path))
    rows = read(tmp_path)
    assert [int(r["step"]) for r in rows] == [3, 6, 9, 12]
    wanted = {"coach_loss", "coach_ratio", "rel_gap", "cosine", "student_grad_norm", "coach_grad_norm", "x_drift"}
    wanted |= {"x_mean", "x_std", "x_mean_0", "x_std_1", "student_loss", "seconds"}
    assert wanted <= rows[0].keys()
    assert rows[0]["rel_gap"] == "" and float(rows[1]["rel_gap"]) > 0  # the coach was alone at first
    mean = sum(s.logs["coach_loss"] for s in steps[3:6]) / 3
    assert float(rows[1]["coach_loss"]) == pytest.approx(mean, rel=1e-4)
    assert steps[5].row["coach_loss"] == pytest.approx(mean) and steps[4].row == {}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("coach_loss")] == [3, 6, 9, 12]


def test_rows_that_a_resumed_run_writes_again_are_not_doubled(tmp_path):
    run("copy", tmp_path, stop=10)
    for path in store.checkpoints(tmp_path / "checkpoints")[:1]:
        path.unlink()  # as if it had been killed after step 8's checkpoint
    with (tmp_path / "log.csv").open("a") as f:
        f.write("11,0.5")  # and in the middle of a row
    run("copy", tmp_path, resume=True)
    assert [int(r["step"]) for r in read(tmp_path)] == [3, 6, 9, 12]


def test_the_coach_ratio_falls_below_one_when_the_coach_has_learnt_something():
    steps = list(train(build("copy", lr=1e-6, coach_lr=5e-3), batches, replace(TINY, steps=150)))
    first, last = (sum(s.logs["coach_ratio"] for s in part) / 10 for part in (steps[:10], steps[-10:]))
    assert last < 0.9 and last < first
