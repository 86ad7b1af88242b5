"""What stops a run, and what is refused before it begins."""

import copy
from dataclasses import replace

import pytest
import torch
from small_runs import TINY, batches, build, contents, run

from distill.training.loop import Diverged, train
from distill.training.options import TrainOptions


@pytest.mark.parametrize("readout, word", [("student_loss", "lower lr"), ("coach_loss", "coach_lr")])
def test_nan_stops_with_the_readout_and_a_cure(tmp_path, readout, word):
    method = build("copy")
    name, steps = readout, []
    loss = getattr(method, name)

    def poisoned(batch, generator):
        value, logs = loss(batch, generator)
        return (value * torch.nan, logs | {name: logs[name] * torch.nan}) if len(steps) == 5 else (value, logs)

    setattr(method, name, poisoned)
    with pytest.raises(Diverged, match=f"step 6: {readout} is nan. Likely cure: .*{word}") as caught:
        for step in train(method, batches, TINY, tmp_path):
            steps.append(step)
    assert caught.value.readout == readout and word in caught.value.cure
    assert contents(tmp_path)[2] == "step-00000004.safetensors"  # the last good one, and nothing after it
    assert all(v.isfinite().all() for v in contents(tmp_path)[0].values())


def test_samples_that_fly_apart_stop_it():
    with pytest.raises(Diverged, match="x_std is .*coach_steps"):
        run("copy", options=replace(TINY, max_spread=0.01))


def test_weights_that_exploded_never_enter_the_average(tmp_path):
    """A step that is finite itself destroys the student; what a resumed run had stays what it was."""
    run("copy", tmp_path, stop=6)
    good = contents(tmp_path)[0]
    with pytest.raises(Diverged):
        run("copy", tmp_path, replace(TINY, save_every=1), resume=True, lr=1e12)
    bad = contents(tmp_path)[0]
    assert all(torch.equal(bad[k], good[k]) for k in good if k.startswith("student_average"))
    method = build("regression", lr=1e4)
    start = copy.deepcopy(method.student.module.mlp.state_dict())
    with pytest.raises(Diverged):
        for step in train(method, batches, TINY):
            average = step.ema
            assert method.student.module.mlp.layers[0].weight.abs().max() > 100  # it has exploded already
    assert all(torch.equal(v, start[k]) for k, v in average.mlp.state_dict().items())


def test_a_method_without_a_coach_is_not_told_to_mind_its_coach():
    with pytest.raises(Diverged, match="Likely cure: lower lr[.]"):
        run("regression", options=replace(TINY, max_spread=1e-4))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"steps": 0}, "steps is 0: 1 or more"),
        ({"steps": -5}, "steps is -5: 1 or more"),
        ({"steps": None}, "give steps or minutes"),
        ({"minutes": 0}, "minutes is 0: above 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        TrainOptions(**wrong)
