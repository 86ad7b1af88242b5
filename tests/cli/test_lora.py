"""A LoRA student from the command line: trained, sampled, gone on with, and exported in every form."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distill.backbones import load
from distill.cli import main
from distill.cli.console import open_model
from distill.file import lora
from distill.header import CheckpointError, read_header

PROMPTS = ["a small red ring", "a large blue square, top left"]
TRAIN = ["train", "vsd", "--steps", 2, "--batch-size", 2, "--device", "cpu", "--lr", "1e-2", "--ema", "None"]
LORAS = ["--student", "lora", "--student-rank", 2, "--rank", 2, "--max-spread", 1000]


def call(*words):
    return main([str(w) for w in words])


def picture(model):
    return model.sample(PROMPTS, torch.Generator().manual_seed(0))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """sd: a teacher; run: a LoRA student of it by a LoRA coach; full: one with all its weights."""
    place = tmp_path_factory.mktemp("lora")
    teacher, prompts = tiny.stable_diffusion(place / "sd", clip=True), place / "prompts.txt"
    prompts.write_text("a red ring\na blue square\n")
    how = ["--teacher", teacher, "--prompts", prompts]
    assert call(*TRAIN, *LORAS, *how, "--out", place / "run") == 0
    assert call(*TRAIN, "--rank", 2, "--max-spread", 1000, *how, "--out", place / "full") == 0
    return place


@pytest.fixture
def student(folder):
    return folder / "run/student.safetensors"


@pytest.fixture(scope="module")
def drawn(folder):
    """The LoRA student's picture, as `distill sample` draws it."""
    return picture(open_model(str(folder / "run/student.safetensors"), "cpu", str(folder / "sd")))


def test_the_file_says_what_it_is(student, capsys):
    held = lora.read(student)
    assert (held.base, held.part, held.adapters.rank, held.adapters.alpha) == ("sd", "unet", 2, 4)
    said = read_header(student)["__metadata__"]
    assert (said["method"], said["teacher"], said["prediction"]) == ("vsd", "sd", "eps") and float(said["t_in"]) == 999
    assert '"student_rank": 2' in said["config"] and '"baked": true' in said["guidance"] and said["license"]
    assert student.stat().st_size < 1e6 and all(n.startswith("unet.") for n in load_file(student))
    assert call("info", student) == 0 and "base  sd" in capsys.readouterr().out


def test_it_is_drawn_with_its_base_and_asks_for_it(folder, student, drawn, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert call("sample", *PROMPTS, "--model", student, "--out", out) == 2
    said = capsys.readouterr().err
    assert "is a LoRA: give the model it was made of, sd, as --base" in said and said.count("\n") == 1
    assert call("sample", *PROMPTS, "--model", student, "--base", folder / "sd", "--out", out) == 0 and out.exists()
    teacher = load(folder / "sd")
    z, cond = torch.randn(teacher.shape(2), generator=torch.Generator().manual_seed(0)), teacher.encode(PROMPTS)
    untouched = teacher.decode(teacher.wrap(teacher.net)(z, torch.ones(2), cond))
    assert not torch.allclose(drawn, untouched, atol=0.01)
    assert call("sample", "a ring", "--base", folder / "sd", "--out", out) == 2
    assert "is no LoRA" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="a LoRA of 'sd', no whole model. Merge the two"):
        load(student)


def test_of_the_bundled_teacher_it_needs_no_base(tmp_path, capsys):
    assert call(*TRAIN, *LORAS, "--out", tmp_path, "--student-targets", "to_q", "to_v") == 0
    student = tmp_path / "student.safetensors"
    assert {n.split(".lora")[0].rpartition(".")[2] for n in load_file(student)} == {"to_q", "to_v"}
    assert call("sample", "a red ring", "--model", student, "--out", tmp_path / "a.png") == 0
    words = tmp_path / "prompts.txt"
    words.write_text("a red ring\na blue square\n")
    assert call("eval", "--model", student, "--prompts", words, "--n", 16, "--device", "cpu") == 0
    assert "seconds_per_picture" in capsys.readouterr().out


def test_a_lora_goes_on_from_a_lora(folder, student, drawn, tmp_path, capsys):
    """Frozen by its rate, the second run's student is the first's; and so is one with full weights."""
    how = ["--teacher", folder / "sd", "--prompts", folder / "prompts.txt", "--init", student]
    still = ["--lr", "1e-12", "--weight-decay", 0]
    assert call(*TRAIN, *LORAS, *how, *still, "--out", tmp_path / "a") == 0
    close(picture(open_model(str(tmp_path / "a/student.safetensors"), "cpu", str(folder / "sd"))), drawn, 1e-4)
    assert call(*TRAIN, "--rank", 2, "--max-spread", 1000, *how, *still, "--out", tmp_path / "b") == 0
    close(picture(load(tmp_path / "b/student.safetensors")), drawn, 0.02)  # stored in half precision
    assert call(*TRAIN, *LORAS, "--student-rank", 4, *how, "--out", tmp_path / "c") == 2
    assert "its LoRA has rank 2 and alpha 4: --student-rank 2 --student-alpha 4" in capsys.readouterr().err


def test_a_lora_goes_on_from_full_weights(folder, tmp_path, capsys):
    """It adds to that student, which is not taken for the bundled one of its name; frozen, it draws what that draws."""
    full, out = folder / "full/student.safetensors", tmp_path / "a/student.safetensors"
    how = ["--teacher", folder / "sd", "--prompts", folder / "prompts.txt", "--init", full, "--out", tmp_path / "a"]
    assert call(*TRAIN, *LORAS, *how, "--lr", "1e-12", "--weight-decay", 0) == 0
    assert lora.read(out).base == "full/student.safetensors" and read_header(out)["__metadata__"]["teacher"] == "sd"
    close(picture(open_model(str(out), "cpu", str(full))), picture(load(full)), 1e-4)
    bench = ["bench", out, "--queries", 1, "--batches", 1, "--batch", 1, "--warmup", 0, "--device", "cpu"]
    bench += ["--out", tmp_path / "bench.json"]
    capsys.readouterr()
    assert call(*bench) == 2 and "full/student.safetensors, as --base" in capsys.readouterr().err
    assert call(*bench, "--base", full) == 0 and "network" in capsys.readouterr().out


def test_a_run_of_another_form_is_not_gone_on_with(folder, capsys):
    how = ["--teacher", folder / "sd", "--prompts", folder / "prompts.txt", "--resume", "--out", folder / "run"]
    assert call(*TRAIN, "--rank", 2, *how) == 2 and "student 'lora', not 'full'" in capsys.readouterr().err
    assert call(*TRAIN, *LORAS, "--student-rank", 4, *how) == 2 and "student_rank 2, not 4" in capsys.readouterr().err
    assert call(*TRAIN, *LORAS, *how) == 0


@pytest.mark.parametrize("form", ["onestep", "diffusers"])
def test_added_to_its_base_it_draws_the_same(folder, student, drawn, tmp_path, form):
    out = tmp_path / ("a.safetensors" if form == "onestep" else "a")
    words = ["export", student, out, "--format", form, "--dtype", "float32"]
    assert call(*words) == 2 and call(*words, "--base", folder / "sd") == 0
    merged = load(out)
    close(picture(merged), drawn)
    assert merged.meta.method == "vsd" and merged.meta.teacher == "sd" and merged.meta.config["student_rank"] == 2
    assert call(*words, "--base", folder / "sd") == 2  # it exists


def test_diffusers_adds_it_to_the_same_pipeline(folder, student, drawn, tmp_path):
    """`load_lora_weights` of the student's own file, and of an export; the scheduler is that of a merged folder."""
    from diffusers import DiffusionPipeline, LCMScheduler

    assert call("export", student, tmp_path / "l.safetensors", "--format", "lora-diffusers") == 0
    assert call("export", student, tmp_path / "m", "--format", "diffusers", "--base", folder / "sd") == 0
    z = torch.randn(load(folder / "sd").shape(2), generator=torch.Generator().manual_seed(0))
    for file in (student, tmp_path / "l.safetensors"):
        pipe = DiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
        pipe.scheduler = LCMScheduler.from_pretrained(tmp_path / "m/scheduler")
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(file)
        theirs = pipe(PROMPTS, latents=z, num_inference_steps=1, guidance_scale=0.0, output_type="pt").images
        close(2 * theirs - 1, drawn, 1e-4)


def test_comfyuis_names_are_kohyas(student, tmp_path):
    assert call("export", student, tmp_path / "l.safetensors", "--format", "lora", "--dtype", "float16") == 0
    ours, theirs = lora.read(student).adapters.pairs(), load_file(tmp_path / "l.safetensors")
    assert len(theirs) == 3 * len(ours) and all(v.dtype == torch.float16 for v in theirs.values())
    down, up = ours["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    close(theirs[f"{name}.lora_up.weight"].float() @ theirs[f"{name}.lora_down.weight"].float(), up @ down, 1e-3)
    assert theirs[f"{name}.alpha"] == 2


def test_full_weights_become_a_lora(folder, tmp_path, capsys):
    """At full rank the picture is the same but for what no adapter holds, norms and biases; at rank 1 much is left."""
    full, out = folder / "full/student.safetensors", tmp_path / "l.safetensors"
    left = []
    for rank in (1, 1024):
        how = ["--format", "lora-diffusers", "--rank", rank, "--base", folder / "sd", "--force"]
        assert call("export", full, out, *how) == 0
        left.append(float(capsys.readouterr().out.partition("leaves ")[2].partition("%")[0]))
    assert lora.read(out).adapters.rank < 1024, "no more than a layer has"
    assert 10 < left[0] < 100 and left[1] < left[0] / 2
    ours, theirs = picture(open_model(str(out), "cpu", str(folder / "sd"))), picture(load(full))
    plain = picture(load(folder / "sd"))
    assert (ours - theirs).norm() < 0.5 * (plain - theirs).norm()
    assert call("export", full, out, "--format", "lora", "--force") == 2
    assert "has full weights: give the model it was made of, sd, as --base" in capsys.readouterr().err


def test_a_lora_of_another_model_or_damaged_is_told(student, tmp_path, capsys):
    other = tiny.write(tmp_path / "other.safetensors", method="teacher", steps=2)
    assert call("sample", "a ring", "--model", student, "--base", other, "--out", tmp_path / "a.png") == 2
    assert "no LoRA of other.safetensors: its layer" in capsys.readouterr().err
    tensors, strings = load_file(student), read_header(student)["__metadata__"]
    for change, says in (({"rank": "x"}, "is no number"), ({"part": "vae"}, "does not hold pairs")):
        save_file(tensors, tmp_path / "bad.safetensors", strings | change)
        with pytest.raises(CheckpointError, match=says):
            lora.read(tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="lacks 'onestep.lora'"):
        lora.read(other)
    wider = {n: torch.cat([v, v]) if n.endswith("lora_A.weight") else v for n, v in tensors.items()}
    for odd in (wider, {n: v.flatten() for n, v in tensors.items()}):
        save_file(odd, tmp_path / "bad.safetensors", strings)
        with pytest.raises(CheckpointError, match="does not hold pairs"):
            lora.read(tmp_path / "bad.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(student.read_bytes().replace(b'"F32"', b'"X32"', 1))
    with pytest.raises(CheckpointError, match="bad.safetensors: damaged: .*unknown variant"):
        lora.read(tmp_path / "bad.safetensors")


def test_what_cannot_be_written_is_told_in_a_line(folder, student, tmp_path, capsys):
    Path(tmp_path / "there.safetensors").write_bytes(b"mine")
    assert call("export", student, tmp_path / "there.safetensors", "--format", "lora") == 2
    assert "add --force" in capsys.readouterr().err and (tmp_path / "there.safetensors").read_bytes() == b"mine"
    assert call("export", "student", tmp_path / "a", "--format", "diffusers") == 2
    assert "diffusers does not know its autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "family, refused, says, taken",
    [
        ("sana", "lora", "ComfyUI's LoraLoader knows no 'sana'. Export it as lora-diffusers", "lora-diffusers"),
        ("pixart", "lora-diffusers", "diffusers' pipelines of 'pixart' take no LoRA. Export it as diffusers", "lora"),
    ],
)
def test_a_lora_is_refused_the_names_of_a_program_that_takes_none(
    student, tmp_path, capsys, family, refused, says, taken
):
    held = lora.read(student)
    other = lora.write(tmp_path / "s.safetensors", replace(held, said=held.said | {"family": family}))
    assert call("export", other, tmp_path / "l.safetensors", "--format", refused) == 2
    assert says in capsys.readouterr().err
    assert call("export", other, tmp_path / "l.safetensors", "--format", taken) == 0


def test_figures_that_were_measured_go_with_every_form(folder, student, tmp_path, capsys):
    base, figures, words = ["--base", folder / "sd"], tmp_path / "figures.json", folder / "prompts.txt"
    measured = ["eval", "--model", student, *base, "--prompts", words, "--n", 16, "--device", "cpu", "--out", figures]
    assert call(*measured) == 0
    expected = json.loads(figures.read_text())
    for form in ("onestep", "diffusers", "lora", "lora-diffusers"):
        out = tmp_path / (form if form == "diffusers" else f"{form}.safetensors")
        how = ["--format", form, "--figures", figures, *([] if "lora" in form else base)]
        assert call("export", student, out, *how) == 0
        if form == "diffusers":
            assert load(out).meta.metrics == expected
            assert f"| figures | {json.dumps(expected)} |" in (out / "README.md").read_text("utf-8")
        else:
            assert json.loads(read_header(out)["__metadata__"]["metrics"]) == expected
    figures.write_text("[1]")
    capsys.readouterr()
    assert call("export", student, tmp_path / "x.safetensors", "--format", "lora", "--figures", figures) == 2
    assert "figures.json: no figures of `distill eval --out`. Measure" in capsys.readouterr().err


def test_a_lora_of_two_steps_keeps_their_times_and_its_base_lends_it_none(folder, student, tmp_path):
    how = [
        "--teacher",
        folder / "sd",
        "--prompts",
        folder / "prompts.txt",
        "--student-then",
        200,
        "--out",
        tmp_path / "two",
    ]
    assert call(*TRAIN, *LORAS, *how) == 0
    two = open_model(str(tmp_path / "two/student.safetensors"), "cpu", str(folder / "sd"))
    assert (two.meta.steps, two.meta.times) == (2, [999, 200])
    assert lora.read(student).student(two.meta, student).times is None
