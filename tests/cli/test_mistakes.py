"""Careless use: it is told, the exit code is 2, nothing is computed or written."""

from pathlib import Path

import pytest

QUICK = ["train", "vsd", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--rank", "2"]


@pytest.mark.parametrize(
    "words, says",
    [
        (["bogus"], "'bogus' is no command; there are demo, train"),
        (["sample"], "prompts"),
        (["sample", "a ring", "--stesp", "3"], "Unrecognized options: --stesp, 3; did you mean --steps?"),
        (["sample", "a ring", "--steps", "x"], "from ['x']; --help tells what there is"),
        (["train", "vds"], "Unrecognized options: vds; there are vsd, sds"),
        (["sample", "a ring", "--steps", "-1"], "steps is -1: 1 or more"),
        (["sample", "a ring", "--steps", "0"], "steps is 0: 1 or more"),
        (["sample", "a ring", "--guidance", "nan"], "guidance is nan: a number"),
        (["sample", "a ring", "--guidance", "5"], "guidance is 5.0: student.safetensors is a student"),
        (["sample", "a ring", "--scale", "0"], "scale is 0: 1 to 64"),
        (["sample", "a ring", "--scale", "1000000"], "scale is 1000000: 1 to 64"),
        (["sample", "a ring", "--seed", "9" * 20], "seed is 99999999999999999999: -9223372036854775808 to"),
        (["sample", "a ring", "--out", "x.foo"], "out is 'x.foo': name a picture, such as samples.png"),
        (["sample", "a ring", "--out", "prompts.txt/x.png"], "prompts.txt is a file"),
        (["sample", "a ring", "--out", "folder.png"], "folder.png is a folder: name a file to write"),
        (["sample", "a ring", "--device", "cuda:99"], "device 'cuda:99' is not there; this machine has"),
        (["sample", "a ring", "--device", "meta"], "device 'meta' is not there; this machine has"),
        (["sample", "a ring", "--device", "foo"], "device 'foo' is not there; this machine has"),
        (
            ["sample", "a ring", "--model", "nowhere"],
            "nowhere: no such file. Give a file or folder, or a bundled",
        ),
        (["sample", "a ring", "--model", "folder"], "no model_index.json"),
        (["sample", "a ring", "--model", "plain.safetensors"], "plain.safetensors: not a OneStep file"),
        (["sample", "\udce5 ring"], "not UTF-8"),
        (["eval", "--n", "0"], "n is 0: 16 or more"),
        (["eval", "--model", "foreign.safetensors"], "foreign.safetensors': not of the tutorial world"),
        (["eval", "--guidance", "nan"], "guidance is nan: a number"),
        (["eval", "--guidance", "5"], "guidance is 5.0: student.safetensors is a student"),
        (["eval", "--out", "folder.json"], "folder.json is a folder: name a file to write"),
        (["eval", "--out", "prompts.txt/x.json"], "prompts.txt is a file"),
        (["eval", "--out", "foreign.safetensors"], "the output is 'foreign.safetensors': name a .json file"),
        (["eval", "--out", "old.json"], "old.json exists: add --force"),
        (["bench", "foreign.safetensors", "--out", "foreign.safetensors"], "'foreign.safetensors': name a .json file"),
        (["bench", "--threads", "1000000"], "threads is 1000000: 1 to "),
        (["export", "teacher", "new.safetensors", "--format", "lora"], "give the model it was made of as --base"),
        (["bench", "--plot", "foreign.safetensors"], "'foreign.safetensors': name a .png file"),
        (["info", "folder"], "folder: a folder. Name a safetensors file in it"),
        (["info", "zero.safetensors"], "zero.safetensors: "),
        (["demo", "--minutes", "0"], "minutes is 0.0: a time, above 0"),
        (["demo", "--minutes", "inf"], "minutes is inf: a time, above 0"),
        (["demo", "--out", "prompts.txt"], "prompts.txt is a file: name a folder to write to"),
        (["demo", "--teacher", "student"], "teacher is 'student.safetensors': a student, made by"),
        (["demo", "--teacher", "nowhere"], "nowhere: no such file. Give a file or folder, or a bundled model"),
        (["demo", "--teacher", "foreign.safetensors"], "not of the tutorial world"),
        ([*QUICK, "--out", "x", "--prompts", "latin.txt"], "latin.txt: line 1: not UTF-8"),
        ([*QUICK, "--out", "x", "--prompts", "folder"], "folder: a folder, not a file of prompts"),
        ([*QUICK, "--out", "x", "--prompts", "empty.txt"], "empty.txt: no prompts in it"),
        ([*QUICK, "--out", "x", "--prompts", "none.txt"], "none.txt: no such file"),
        ([*QUICK, "--out", "x", "--batch-size", "0"], "batch-size is 0: 1 or more"),
        ([*QUICK, "--out", "x", "--t-in", "5000"], "t_in is 5000.0: above 0 and at most 999"),
        ([*QUICK, "--out", "x", "--t-in", "-1"], "t_in is -1.0: above 0 and at most 999"),
        ([*QUICK, "--out", "x", "--steps", "0"], "steps is 0: 1 or more"),
        ([*QUICK, "--out", "x", "--steps", "-5"], "steps is -5: 1 or more"),
        ([*QUICK, "--out", "x", "--betas", "2", "3"], "betas is (2.0, 3.0): 0 or more, below 1"),
        ([*QUICK, "--out", "x", "--lr", "nan"], "lr is nan: above 0"),
        ([*QUICK, "--out", "x", "--lr-warmup", "-1"], "lr_warmup is -1: 0 or more"),
        ([*QUICK, "--out", "x", "--minutes", "inf"], "minutes is inf: above 0"),
        ([*QUICK, "--out", "x", "--weight-decay", "nan"], "weight_decay is nan: 0 or more"),
        ([*QUICK, "--out", "x", "--max-spread", "nan"], "max_spread is nan: above 0"),
        ([*QUICK, "--out", "x", "--autoguidance", "nan"], "autoguidance is nan: a number"),
        ([*QUICK, "--out", "x", "--guidance-max", "nan"], "guidance_max is nan: a number"),
        ([*QUICK, "--out", "x", "--guidance", "100000"], "'guidance.scale' is 100000.0, not a number from -1000 to"),
        ([*QUICK, "--out", "x", "--seed", "9" * 30], "seed is " + "9" * 30 + ": -9223372036854775808 to"),
        (["demo", "--out", "x", "--seed", "9" * 30], "seed is " + "9" * 30 + ": -9223372036854775808 to"),
        ([*QUICK, "--out", "prompts.txt"], "prompts.txt is a file: name a folder to write to"),
        ([*QUICK, "--out", "prompts.txt/x"], "prompts.txt is a file"),
        ([*QUICK, "--out", "x", "--teacher", "student"], "teacher is 'student.safetensors': a student, made by"),
        ([*QUICK, "--out", "x", "--t-min", "2"], "t_min, t_max is (2.0, 0.98)"),
        ([*QUICK, "--out", "x", "--teacher", "foreign.safetensors"], "not of the tutorial world: give --prompts"),
        (
            [*QUICK, "--out", "x", "--weak", "foreign.safetensors", "--autoguidance", "2"],
            "prediction is x0, teacher.safetensors's is v",
        ),
        ([*QUICK, "--out", "x", "--init", "foreign.safetensors"], "foreign.safetensors: another architecture"),
        (["quantize", "plain.safetensors", "plain.safetensors"], "plain.safetensors is the source itself"),
        (["quantize", "student", "new.safetensors", "--samples", "0"], "samples is 0: 1 or more"),
        (["quantize", "student", "new.safetensors", "--rows", "0"], "rows is 0: 1 or more"),
        (["quantize", "student", "new.safetensors", "--steps", "0"], "steps is 0: 1 or more"),
        (["quantize", "student", "new.safetensors", "--rank", "0"], "rank is 0: 1 or more"),
        (["quantize", "student", "new.safetensors", "--budget", "-1"], "budget is -1.0: above 4, the bits of a code"),
        (["quantize", "student", "new.safetensors", "--budget", "4"], "budget is 4.0: above 4, the bits of a code"),
        (["quantize", "student", "new.safetensors", "--seed", "9" * 20], "seed is 99999999999999999999: -922"),
        (["quantize", "student", "folder"], "folder is a folder: name a file to write"),
        (["quantize", "student", "new.safetensors", "--report", "prompts.txt/r.json"], "prompts.txt is a file"),
        (["quantize", "student", "new.safetensors", "--report", "plain.safetensors"], "name a .json file"),
        (["quantize", "student", "new.safetensors", "--report", "old.json"], "old.json exists: add --force"),
        (["quantize", "plain.safetensors", "foreign.safetensors"], "foreign.safetensors exists: add --force"),
    ],
    ids=lambda v: " ".join(v)[:60].encode("ascii", "replace").decode() if isinstance(v, list) else "",
)
def test_mistakes_are_told_and_exit_2(place, door, words, says):
    before = {p: p.read_bytes() for p in place.iterdir() if p.is_file()}
    code, out, err = door(*words)
    assert code == 2, err
    assert err.startswith("distill: ") and err.count("\n") == 1 and says in err
    assert not out.strip() and not Path("x").exists()
    assert before == {p: p.read_bytes() for p in place.iterdir() if p.is_file()}


def test_a_folder_without_permission_is_found_before_anything_is_computed(place, door, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for words in (["sample", "a ring"], ["eval", "--out", "new/x.json"], [*QUICK, "--out", "new"]):
        code, _, err = door(*words)
        assert code == 2 and f"cannot be written: no permission for {place}" in err and not Path("new").exists()
