"""`distill info`: what a file says about itself."""

import json

import pytest
import torch
from safetensors.torch import save_file


def test_a_student_tells_how_it_must_be_called(door):
    code, out, _ = door("info", "student")
    assert code == 0 and "prediction  v" in out and "t_in  999" in out and '"baked": true' in out
    assert "numbers (F16 " in out and "tokenizer" not in out


def test_a_plain_file_is_shown_by_its_header(place, door):
    code, out, _ = door("info", "plain.safetensors")
    assert code == 0 and "1 tensors, 0.00 M numbers (F32 0.00 M)" in out
    assert "not a OneStep file" in out and "somebody" in out


def test_a_quantized_file_of_another_family_tells_how(place, door):
    """Such as SD's, which has no metadata of OneStep's but the quantizer's."""
    card = {"quantization": json.dumps({"method": "awq", "bits": 4})}
    save_file({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "sd.safetensors", card)
    code, out, err = door("info", "sd.safetensors")
    assert code == 0 and '"method": "awq"' in out and "distill train" not in out + err


def test_a_stranger_s_text_does_not_reach_the_terminal_raw(place, door):
    save_file({"a": torch.ones(1)}, "x.safetensors", {"na\x1bme": "\x1b]0;title\x07\nline", "long": "x" * 1000})
    _, out, _ = door("info", "x.safetensors")
    assert "\x1b" not in out and "\x07" not in out and "\\x1b]0;title\\x07\\nline" in out and len(out) < 600


HUGE = {"dtype": "F32", "shape": [10**400]}  # more than a float


@pytest.mark.parametrize("entry", [{"shape": [2]}, {"dtype": "F32"}, {"dtype": "F32", "shape": ["x"]}, HUGE])
def test_a_damaged_entry_is_told(place, door, entry):
    header = json.dumps({"a": entry | {"data_offsets": [0, 8]}}).encode()
    (place / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    code, _, err = door("info", "x.safetensors")
    assert code == 2 and "x.safetensors: damaged: its header is not a table of tensors" in err
