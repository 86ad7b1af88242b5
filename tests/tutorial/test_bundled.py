"""The bundled models are as good as they say."""

from distill.backbones import load
from distill.cli.eval import steps_of
from distill.file.metadata import read_metadata
from distill.tutorial import metrics
from distill.tutorial.bundled import bundled


def test_bundled_models_are_small_and_carry_their_figures():
    total = sum(bundled(name).stat().st_size for name in ("teacher", "student", "weak", "judge"))
    assert total < 40e6
    for name in ("teacher", "student"):
        meta = read_metadata(bundled(name))
        report = meta.metrics[steps_of(meta.steps)]
        assert report["n"] == 1024 and report["accuracy"] > 0.95 and report["held_out_accuracy"] > 0.85


def test_the_bundled_student_opens_its_own_graph():
    nodes = read_metadata(bundled("student")).workflow["nodes"]
    assert [n["widgets_values"] for n in nodes if n["type"] == "OneStepLoadStudent"] == [["bundled: student"]]


def test_bundled_student_is_as_good_as_its_card():
    student = load(bundled("student"))
    report = metrics.evaluate(student.sample, metrics.Judge.load(), n=256)
    card = student.meta.metrics["1 step"]
    assert report.accuracy > card["accuracy"] - 0.04
    assert abs(report.clean - card["clean"]) < 0.1
