"""A file is data: whatever its metadata says, it loads or is refused by name, soon, and in little memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from distill.backbones import load
from distill.file.metadata import Metadata, read_metadata
from distill.file.schema import FIELDS, SCHEDULES
from distill.header import CheckpointError, read_header


@pytest.fixture(scope="module")
def strings(tmp_path_factory):
    """A tiny file's metadata."""
    path = tiny.write(tmp_path_factory.mktemp("metadata") / "student.safetensors")
    return read_header(path)["__metadata__"]


TENSORS = 300
CASES = {  # where -> value; comfyui.md's worst
    "text_encoder.max_length": [0, 1, 33, 10**9, "77", None, True],
    "text_encoder.tokenizer": [None, [], {}],
    "text_encoder": ["x", 7, [], {}],
    "architecture.text_encoder.num_hidden_layers": [10**6, 0, -1, 2.0, "2"],
    "architecture.text_encoder.hidden_size": [10**9, 64, 0],
    "architecture.text_encoder.vocab_size": [10**9],
    "architecture.text_encoder.attn_implementation": ["someone/kernels"],
    "architecture.vae": [7, [], {}, {"type": "patch"}, {"type": ["patch"]}],
    "architecture.vae.depth": [10**6, 0, None],
    "architecture.vae.width": [10**6],
    "architecture.vae.detail": [10**6],
    "architecture.vae.factor": [0, 4, 10**6],
    "architecture.unet": [None, []],
    "architecture.unet.block_out_channels": [[10**5, 10**5], [32], [], 32, [32, "64"]],
    "architecture.unet.cross_attention_dim": [10**9],
    "architecture.unet.layers_per_block": [10**6, [1] * 1000, [1]],
    "architecture.unet.sample_size": [2048, [8, 1024]],
    "architecture.unet.class_embed_type": ["timestep"],
    "architecture.unet.num_class_embeds": [10],
    "architecture.unet.norm_eps": ["x", 2],
    "architecture.unet.transformer_layers_per_block": [10**6, [301, 1]],
    "architecture.unet.attention_head_dim": [0],
    "schedule.kind": [["ddpm"], {}, 7, None],
    "schedule.num_train_timesteps": [10**9, 1, 0, 1000.0],
    "schedule.shift": ["x", 0, -1, 1e300, None],
    "schedule.beta_start": ["x", 0, 2],
    "schedule.unheard_of": [1],
    "latent": [[], 7],
    "latent.scale": ["x", None, 0],
    "latent.factor": [0, 10**9],
    "latent.channels": [4, "8"],
    "latent.rgb_factors": [[[1, 2, 3]], "x", [[1]]],
    "steps": [10**9, 0, 1.5, "1"],
    "t_in": [-1, 0, 1000, 10**300, "999"],
    "times": [[], [200], [999, 999], [999, 0], [200, 999], 999, ["999"]],
    "guidance": [{}, []],
    "guidance.scale": ["x", None],
    "prediction": [["x0"]],
}


@pytest.mark.parametrize(("where", "value"), [(where, value) for where, values in CASES.items() for value in values])
def test_a_wrong_value_is_named(strings, where, value):
    field, *keys = where.split(".")
    tree = {field: json.loads(strings.get(field, "null")) if field != "prediction" else strings[field]}
    node = tree
    for key in (field, *keys)[:-1]:
        node = node[key]
    node[(field, *keys)[-1]] = value
    with pytest.raises(CheckpointError) as e:
        Metadata.from_strings(strings | {field: json.dumps(tree[field])}, "my.safetensors", TENSORS)
    line = str(e.value)
    assert line.startswith("my.safetensors: metadata '") and "\n" not in line and len(line) < 400
    assert field in line and line.endswith("make it again with `distill train` or OneStep Quantize.")


@pytest.mark.parametrize("kind", [{"kind": "edm", "rho": 0}, {"kind": "edm", "sigma_min": 9, "sigma_max": 1}])
def test_a_wrong_schedule_of_another_kind_is_named(strings, kind):
    with pytest.raises(CheckpointError, match="schedule"):
        Metadata.from_strings(strings | {"schedule": json.dumps(kind), "t_in": "0.5"}, "my.safetensors")


@pytest.mark.parametrize("version", ["2", "\u00b2", "9" * 5000, "", "1.0", "-1"])
def test_only_a_known_version_is_read(strings, version):
    with pytest.raises(CheckpointError, match="Update OneStep") as e:
        Metadata.from_strings(strings | {"onestep.version": version}, "my.safetensors")
    assert len(str(e.value)) < 200


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "NaN", "{"])
def test_what_is_no_json_is_named(strings, text):
    with pytest.raises(CheckpointError, match="'latent' is not JSON"):
        Metadata.from_strings(strings | {"latent": text}, "my.safetensors")


@pytest.mark.parametrize("found", [None, [], {"onestep.version": 1}, {"a": None}, "x"])
def test_metadata_that_is_no_text_is_refused(tmp_path, found):
    text = json.dumps({"__metadata__": found}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=f"{path}: damaged: its header is not a table of tensors"):
        read_metadata(path)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"shape": "x"},
        {"shape": ["x"]},
        {"shape": [-1]},
        {"data_offsets": [4]},
        {"data_offsets": [4, 0]},
        {"dtype": 7},
    ],
)
def test_an_entry_that_is_none_is_refused(tmp_path, entry):
    sound = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"a": sound | entry if entry else entry}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=f"{path}: damaged: its header is not a table of tensors"):
        read_header(path)


def test_a_name_too_long_for_the_disk_is_one_line():
    with pytest.raises(CheckpointError, match="cannot be opened: File name too long"):
        read_metadata("x" * 300)


DOUBLED = {"type": "Replace", "pattern": {"String": "z"}, "content": "zz"}  # no letter of the prompts it is tried on
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"].pop("vocab"),
        lambda t: t["model"]["vocab"].update({"red": 99}),  # the text encoder has no such row
        lambda t: t["post_processor"].update({"single": []}),  # no start, no end
        lambda t: t["model"].update({"type": "Unheard"}),
        lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [DOUBLED] * 40}),
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [BYTES] * 40}),
    ],
)
def test_a_tokenizer_that_does_not_serve_is_named(tmp_path, strings, change):
    tokens = json.loads(strings["text_encoder"])
    change(tokens["tokenizer"])
    mods = tiny.modules()
    path = tmp_path / "words.safetensors"
    from distill.file import checkpoint

    pipeline = tiny.pipeline(mods)
    pipeline.meta.text_encoder.update(tokens)
    checkpoint.write(path, checkpoint.pack(pipeline))
    with pytest.raises(CheckpointError, match=f"{path}: metadata 'text_encoder' has .* tokenizer"):
        load(path)


def test_a_pattern_without_an_end_is_the_file_s_fault(tmp_path):
    """The library panics at the first prompt that it goes on and on with."""
    from distill.file import checkpoint

    pipeline = tiny.pipeline(tiny.modules())
    endless = {"type": "Replace", "pattern": {"Regex": "(z+)+$"}, "content": "z"}
    pipeline.meta.text_encoder["tokenizer"]["normalizer"] = endless
    path = checkpoint.write(tmp_path / "words.safetensors", checkpoint.pack(pipeline))
    model = load(path)
    assert model.encode(["a red ring"])
    with pytest.raises(CheckpointError, match="words.safetensors: metadata 'text_encoder' has no sound tokenizer"):
        model.encode(["z" * 60 + "b"])


def test_the_tokenizers_own_padding_is_not_believed(tmp_path, strings):
    from distill.file import checkpoint

    pipeline = tiny.pipeline(tiny.modules())
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    pipeline.meta.text_encoder["tokenizer"]["padding"] = padding
    path = checkpoint.write(tmp_path / "padded.safetensors", checkpoint.pack(pipeline))
    assert load(path).encode(["a red ring"])["encoder_hidden_states"].shape[1] == 32


def test_every_field_and_option_has_a_rule():
    import inspect
    from dataclasses import fields

    from distill import schedule

    assert [f.name for f in fields(Metadata)] == list(FIELDS)
    for kind, rules in SCHEDULES.items():
        assert set(inspect.signature(schedule.SCHEDULES[kind]).parameters) == set(rules)


def test_metadata_that_is_no_json_is_not_written(tmp_path):
    for metrics in ({"loss": math.nan}, {"path": Path("x")}):
        with pytest.raises(CheckpointError, match="'metrics' is no JSON .* Nothing was written"):
            tiny.write(tmp_path / "m.safetensors", metrics=metrics)
    assert not list(tmp_path.iterdir())


def test_two_thousand_damaged_files(tmp_path):
    """Metadata, header and quantized layers changed at random places; the child's docstring says what must hold."""
    child = Path(__file__).parent / "damaged_files.py"
    run = subprocess.run([sys.executable, child, tmp_path, "2000"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "2000 files" in run.stdout
