"""`distill sample`: the pictures that were asked for."""

from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from distill.tutorial import metrics


def test_it_draws_what_is_asked_and_the_same_again(place, door):
    prompts = ["a large red ring on a white background, in the center", "a small blue star, top left"]
    for name in ("a.png", "new/b.png"):
        assert door("sample", *prompts, "--out", name, "--scale", 1, "--seed", 3) == (0, f"{name}\n", "")
    image = Image.open("a.png")
    assert image.size == (128, 64)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 2, 64, 3).permute(1, 3, 0, 2)
    read = metrics.Judge.load().read(pixels / 127.5 - 1).attributes
    asked = torch.tensor([[4, 0, 0, 1, 0], [3, 4, int(read[1, 2]), 0, 1]])  # the second background is left open
    assert torch.equal(read, asked)
    assert Path("a.png").read_bytes() == Path("new/b.png").read_bytes()


@pytest.mark.parametrize("prompt", ["", "a\tred ring", "ein Schäfchen 👨‍👩‍👧", "a red ring " * 60])
def test_any_text_is_a_prompt(place, door, prompt):
    assert door("sample", prompt, "--scale", 1)[0] == 0 and Image.open("samples.png").size == (64, 64)


def test_a_teacher_takes_steps_and_guidance(place, door):
    pictures = []
    for how in (["--steps", 1], ["--steps", 2], ["--steps", 2, "--guidance", 4]):
        assert door("sample", "a red ring", "--model", "foreign.safetensors", *how, "--out", "x.bmp")[0] == 0
        pictures.append(Path("x.bmp").read_bytes())
    assert len(set(pictures)) == 3


def test_small_pictures_are_enlarged_and_large_ones_are_not(place, door):
    tiny.write("large.safetensors", unet={"sample_size": 40})
    for model, side in (("foreign.safetensors", 256), ("large.safetensors", 320)):
        assert door("sample", "a red ring", "--model", model)[0] == 0 and Image.open("samples.png").size == (side, side)
