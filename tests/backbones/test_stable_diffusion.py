"""One way to open a model: OneStep files and diffusers' folders through the same backbone."""

import warnings
from contextlib import nullcontext

import pytest
import tiny
import torch
from PIL import Image

from distill.backbones import load
from distill.backbones.base import weaker
from distill.denoiser import guided
from distill.header import CheckpointError
from distill.packed.weight import narrowed
from distill.sample import few_step, one_step, solve
from distill.schedule import randn
from distill.training.batches import image_batches

PROMPTS = ["a small red ring", "a large blue square, top left"]
CURVES = {"scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012}, "linear": {}}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"), clip=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    latent = tiny.LATENT | {"scale": 0.6, "shift": 0.2}
    return load(tiny.write(tmp_path_factory.mktemp("file") / "s.safetensors", t_in=499, latent=latent))


# ------------------------------------------------------------------------------------------------ diffusers' folders


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("curve", CURVES)
@torch.no_grad()
def test_a_teacher_is_what_its_pipeline_is(tmp_path, prediction, curve):
    """The same picture from the same noise, with guidance, at four steps of the same scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tiny.stable_diffusion(tmp_path, prediction=prediction, beta_schedule=curve, **CURVES[curve])
    model = load(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    z = randn(model.shape(2), generator())
    theirs = pipe(PROMPTS, latents=z, num_inference_steps=4, guidance_scale=3.0, output_type="latent", eta=0.0).images
    times = [model.time(float(t)) for t in pipe.scheduler.timesteps]
    ours = solve(guided(model.denoiser, 3.0, model.encode([""])), z, model.encode(PROMPTS), solver="ddim", times=times)
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-4)


def test_no_argument_of_ours_is_deprecated(folder, monkeypatch):
    monkeypatch.setattr("distill.backbones.folder.quiet", nullcontext)  # which hides diffusers' advice on the folder
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert load(folder, dtype=torch.bfloat16).net.dtype is torch.bfloat16


def test_what_a_folder_says_is_read_from_its_configuration(folder):
    meta = load(folder).meta
    assert (meta.prediction, meta.t_in, meta.guidance["baked"]) == ("eps", 999, False)
    assert meta.latent == {"channels": 4, "scale": 0.7, "shift": 0.0, "factor": 8}
    assert meta.schedule["beta_schedule"] == "linear" and meta.architecture["text_encoder"]["eos_token_id"] == 2


@torch.no_grad()
def test_a_student_of_a_folder_is_a_file_that_draws_the_same(folder, tmp_path):
    """CLIP's own tokenizer, padding and eos_token_id 2 included."""
    teacher = load(folder)
    file = teacher.save_student(tmp_path / "student.safetensors", teacher.net, dtype=torch.float32, method="vsd")
    student = load(file)
    assert student.meta.teacher == folder.name and student.meta.guidance == {"scale": 7.5, "baked": True}
    for prompts in (PROMPTS, [""]):
        ours, theirs = teacher.encode(prompts), student.encode(prompts)
        torch.testing.assert_close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    z = randn(teacher.shape(2), generator())
    before = teacher.decode(one_step(teacher.denoiser)(z, teacher.encode(PROMPTS)))
    torch.testing.assert_close(student.sample(PROMPTS, generator()), before, rtol=1e-4, atol=1e-4)


def test_numbers_that_half_precision_does_not_hold_are_saved_as_they_are(tmp_path):
    """A net of norms may draw well with weights beyond 65504: as halves they would be infinite, its pictures NaN."""
    model = load(tiny.stable_diffusion(tmp_path / "sd"))
    with torch.no_grad():
        model.net.down_blocks[0].resnets[0].conv1.weight.mul_(1e7)
    for path in (tmp_path / "student.safetensors", tmp_path / "student"):
        (model.save_folder if not path.suffix else model.save)(path, model.net)
        saved = load(path).net.state_dict()
        assert saved["down_blocks.0.resnets.0.conv1.weight"].abs().max() > 65504
        assert all(v.isfinite().all() for v in saved.values())
    assert narrowed(torch.ones(2).to(torch.float8_e4m3fn)).dtype == torch.float16


def test_folders_that_are_none_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="no model_index.json in it. Give a diffusers folder"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(CheckpointError, match="a KandinskyPipeline, of which no backbone is known; there are Stable"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a pipeline's index"):
        load(tmp_path)


# --------------------------------------------------------------------------------------- what a backbone answers


@torch.no_grad()
def test_a_student_is_called_where_its_file_says(student):
    """At its own timestep, in one step and in several; latents scaled and shifted on their way to the decoder."""
    z, cond, at = randn(student.shape(2), generator()), student.encode(PROMPTS), 499 / 999
    x0 = student.latents(z, cond)
    torch.testing.assert_close(x0, one_step(student.denoiser, at)(z, cond))
    assert not torch.allclose(x0, one_step(student.denoiser)(z, cond), rtol=0.01)
    several = few_step(student.denoiser, [at, at * 2 / 3, at / 3])(z, cond, generator(1))
    torch.testing.assert_close(student.latents(z, cond, steps=3, generator=generator(1)), several)
    expected = student.parts["vae"].decode(x0 / 0.6 + 0.2).clamp(-1, 1)
    torch.testing.assert_close(student.decode(x0), expected)
    torch.testing.assert_close(student.to_latents(expected), (student.parts["vae"].encode(expected) - 0.2) * 0.6)


@torch.no_grad()
def test_a_teacher_is_guided_as_its_file_says(tmp_path):
    guidance = {"scale": 3.0, "baked": False}
    teacher = load(tiny.write(tmp_path / "t.safetensors", method="teacher", steps=2, guidance=guidance))
    z, cond = randn(teacher.shape(2), generator()), teacher.encode(PROMPTS)
    expected = solve(guided(teacher.denoiser, 3.0, teacher.encode([""])), z, cond, steps=2)
    torch.testing.assert_close(teacher.latents(z, cond), expected)
    plain = teacher.latents(z, cond, guidance=1.0)
    torch.testing.assert_close(plain, solve(teacher.denoiser, z, cond, steps=2))
    assert not torch.allclose(plain, expected, rtol=0.01)


def test_what_cannot_be_asked_of_a_student(student):
    z, cond = randn(student.shape(1), generator()), student.encode(["a ring"])
    with pytest.raises(ValueError, match="guidance is 5: s.safetensors is a student"):
        student.latents(z, cond, guidance=5)
    with pytest.raises(ValueError, match="steps is 0: 1 or more"):
        student.latents(z, cond, steps=0)
    with pytest.raises(ValueError, match="t_in is 5000: above 0 and at most 999"):
        student.time(5000)


def test_gradients_pass_the_decoder(student):
    x0 = randn(student.shape(1), generator()).requires_grad_()
    student.decode(x0).square().mean().backward()
    assert x0.grad.norm() > 0 and all(p.grad is None for p in student.parts["vae"].parameters())


def test_features_come_from_every_level_with_gradients(student):
    x = randn(student.shape(2), generator()).requires_grad_()
    found = student.features(student.net, x, torch.tensor([10.0, 500.0]), student.encode(PROMPTS))
    assert [f.shape[1] for f in found] == [32, 64, 64] and all(len(f) == 2 for f in found)
    found[-1].mean().backward()
    assert x.grad.norm() > 0
    assert not any(layer._forward_hooks for layer in student.feature_layers(student.net))


def test_lora_targets_are_the_nets_layers(student):
    targets = student.lora_targets()
    assert "conv_in" in targets and any(n.endswith("attn2.to_k") for n in targets)
    modules = dict(student.net.named_modules())
    assert all(isinstance(modules[n], (torch.nn.Linear, torch.nn.Conv2d)) for n in targets)


# ----------------------------------------------------------------------------------------------------------- data


def test_pictures_in_a_folder_are_batches_of_latents(student, tmp_path):
    Image.new("RGB", (100, 80), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), (0, 0, 255)).save(tmp_path / "b.jpg")
    (tmp_path / "a.txt").write_text("a red square")
    batch = image_batches(student, tmp_path, 8)(0, generator())
    assert batch["x0"].shape == student.shape(8) and len(batch["cond"]["class_labels"]) == 8
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    with torch.no_grad():
        expected = student.to_latents(red)
    is_red = (batch["cond"]["class_labels"] == student.encode(["a red square"])["class_labels"]).all(1)
    assert 0 < is_red.sum() < 8
    expected = expected.expand(int(is_red.sum()), -1, -1, -1)
    torch.testing.assert_close(batch["x0"][is_red], expected, rtol=0.01, atol=0.01)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no pictures in it"):
        image_batches(student, tmp_path / "none", 8)


def test_a_weaker_teacher_has_the_teacher_s_words(tmp_path):
    teacher = load(tiny.write(tmp_path / "teacher.safetensors"))
    weaker(teacher, load(tiny.write(tmp_path / "early.safetensors", seed=1)))
    other = load(tiny.write(tmp_path / "other.safetensors", pad="<start>"))
    with pytest.raises(CheckpointError, match=r"other.safetensors: its words \(text_encoder\) are not teacher"):
        weaker(teacher, other)
