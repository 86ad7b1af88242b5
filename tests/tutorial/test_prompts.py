"""Prompts of the tutorial world are for models of this world."""

from types import SimpleNamespace

from distill.file.metadata import read_metadata
from distill.tutorial.bundled import bundled
from distill.tutorial.prompts import calibration_prompts, is_vocabulary


def model(words):
    return SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: words))


def test_a_model_is_of_this_world_by_its_words():
    words = read_metadata(bundled("student")).text_encoder["tokenizer"]["model"]["vocab"]
    assert is_vocabulary(words) and not is_vocabulary([*words, "photograph"]) and not is_vocabulary([["a", 0.5]])
    prompts = calibration_prompts(model(words), 5, 1)
    assert len(prompts) == 5 and prompts == calibration_prompts(model(words), 5, 1) != calibration_prompts(
        model(words), 5, 2
    )
    assert calibration_prompts(model({"a": 0, "photograph": 1}), 5, 1) is None
