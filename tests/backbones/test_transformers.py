"""What only transformers have: encoders that are absent, sizes that are told, tokens. The rest is in test_families."""

import re
from dataclasses import replace

import families
import pytest
import tiny_transformers
import torch
from test_families import PROMPTS, close, generator, pipeline

from distill.backbones import load
from distill.cli import main
from distill.denoiser import map_cond
from distill.header import CheckpointError
from distill.sample import prior_scale, solve
from distill.schedule import randn


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Made when they are first asked for."""

    class Made(dict):
        def __missing__(self, name):
            self[name] = tiny_transformers.make(name, tmp_path_factory.mktemp(name))
            return self[name]

    return Made()


@pytest.fixture(params=["sd3", "flux", "pixart", "sana"])
def model(request, folders):
    return load(folders[request.param])


def test_prompts_are_encoded_together_as_they_are_alone(model):
    alone = map_cond(lambda *rows: torch.cat(rows), *(model.encode([p]) for p in PROMPTS))
    torch.testing.assert_close(model.encode(PROMPTS), alone)


@pytest.mark.parametrize("name", ["sigma", "sana"])
@torch.no_grad()
def test_the_scheduler_that_came_with_it_gives_the_same(folders, name, monkeypatch):
    """DPM-Solver++ of PixArt and Sana. It tells a flow's net whole timesteps, rounded down, and begins just below level
    1 with noise of 1."""
    teacher, pipe = load(folders[name]), pipeline(folders[name])
    z = randn(teacher.shape(2, families.SIZE), generator())
    theirs = families.ask(pipe, z, PROMPTS, num_inference_steps=3, output_type="latent")
    levels = pipe.scheduler.sigmas[:-1] * 1000 if name == "sana" else pipe.scheduler.timesteps
    times = [teacher.time(float(t)) for t in levels]
    call = teacher.call
    monkeypatch.setattr(teacher, "call", lambda net, x, index, cond: call(net, x, index.floor(), cond))
    z = z / prior_scale(teacher.denoiser, torch.tensor(times[:1]), z)
    close(solve(teacher.denoiser, z, teacher.encode(PROMPTS), solver="dpm++", times=times), theirs)


@pytest.mark.parametrize("absent", ["", "_2", "_3"])
@torch.no_grad()
def test_sd3_takes_zeros_for_an_encoder_it_lacks(folders, tmp_path, absent):
    """A CLIP of 16 channels, one of 24, a T5 of 48: each has its place."""
    expected = load(folders["sd3"]).encode(PROMPTS)
    found = load(tiny_transformers.without(folders["sd3"], tmp_path / "sd3", absent)).encode(PROMPTS)
    columns = {"": slice(0, 16), "_2": slice(16, 40), "_3": slice(0, 48)}[absent]
    rows = slice(32, None) if absent == "_3" else slice(0, 32)  # CLIP's words, then T5's
    expected["encoder_hidden_states"][:, rows, columns] = 0
    if absent != "_3":
        expected["pooled_projections"][:, columns] = 0
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_sd3_with_its_t5_alone_and_with_nothing(folders, tmp_path):
    expected = load(folders["sd3"]).encode(PROMPTS)["encoder_hidden_states"][:, 32:]
    model = load(tiny_transformers.without(folders["sd3"], tmp_path / "sd3", "", "_2"))
    found = model.encode(PROMPTS)
    torch.testing.assert_close(found["encoder_hidden_states"][:, -256:], expected)
    assert not found["encoder_hidden_states"][:, :-256].any() and found["pooled_projections"].shape == (2, 40)
    assert not found["pooled_projections"].any()
    model.free("text_encoder_3")
    with pytest.raises(CheckpointError, match="holds no text_encoder_3. Open it from a file or folder with all"):
        model.encode(PROMPTS)
    with pytest.raises(CheckpointError, match="holds no text_encoder."):
        load(tiny_transformers.without(folders["sd3"], tmp_path / "none", "", "_2", "_3")).encode(PROMPTS)


@torch.no_grad()
def test_the_card_opens_a_student_that_lacks_an_encoder(folders, tmp_path):
    """diffusers wants to be told of it, and then draws what `sample` draws."""
    model = load(tiny_transformers.without(folders["sd3"], tmp_path / "sd3", "_3"))
    path = model.save_student(tmp_path / "s", model.net, dtype=torch.float32, method="vsd")
    names, code = {}, re.search("```python\n(.*?)```", (path / "README.md").read_text("utf-8"), re.S)[1]
    code = code.replace("this folder", str(path)).replace(", sigmas=", ", latents=z, output_type='pt', sigmas=")
    z = randn(model.shape(1), generator())
    exec(code, names | {"z": z}, names)  # noqa: S102
    close(2 * names["picture"][None] - 1, load(path).sample(["a prompt"], generator()))


def test_flux_reads_its_guidance_and_its_shift(folders):
    """dev's guidance is embedded, its shift that of 1024 pixels (1.15, exponential); schnell's is none, and it is a
    student of four steps."""
    dev, schnell = load(folders["flux"]), load(folders["schnell"])
    assert dev.meta.guidance == {"scale": 1.0, "baked": False, "embedded": 3.5} and dev.meta.steps == 28
    assert dev.meta.schedule["shift"] == pytest.approx(2.718281828**1.15)
    assert dev.encode(PROMPTS)["guidance"].tolist() == [3.5, 3.5]
    dev.meta = replace(dev.meta, guidance={"scale": 1.0, "baked": True})
    assert dev.encode(PROMPTS)["guidance"].tolist() == [3.5, 3.5]
    assert schnell.meta.guidance == {"scale": 1.0, "baked": False} and schnell.meta.steps == 4
    assert schnell.meta.schedule["shift"] == 1 and "guidance" not in schnell.encode(PROMPTS)
    assert dev.shape(3) == (3, 16, 128, 128) and dev.shape(1, 512) == (1, 16, 128, 128)


def test_flux_needs_both_its_encoders(folders, tmp_path):
    with pytest.raises(CheckpointError, match="holds no text_encoder_2. Open it from"):
        load(tiny_transformers.without(folders["flux"], tmp_path / "flux", "_2")).encode(PROMPTS)


def test_flux_is_exported_with_the_name_by_which_older_comfyui_know_it(folders):
    """Newer ones take "weight" too."""
    model = load(folders["flux"])
    assert "double_blocks.0.img_attn.norm.key_norm.scale" in model.comfy_weights(model.net)


@torch.no_grad()
def test_in_half_precision_flux_is_told_the_time_its_pipeline_tells(folders):
    """Which rounds it before it divides it; a coarse time, but the one it was trained with."""
    model, told = load(folders["flux"], dtype=torch.bfloat16), []
    model.net.register_forward_pre_hook(lambda net, args, how: told.append(how["timestep"]), with_kwargs=True)
    z = randn(model.shape(1, families.SIZE), generator())
    families.ask(model.pipeline, z.bfloat16(), PROMPTS[:1], num_inference_steps=3, output_type="latent")
    for t in model.pipeline.scheduler.timesteps:
        model.denoiser(z, torch.tensor([model.time(float(t))]), model.null)
    assert len(told) == 6 and told[:3] == told[3:]


def test_a_flow_called_below_its_noisiest_timestep_is_refused_before_it_is_trained(folders, tmp_path, capsys):
    """diffusers would start it from more noise than `sample` does; there are no other files of these families."""
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    words = ["train", "sds", "--teacher", folders["sd3"], "--prompts", tmp_path / "prompts.txt", "--t-in", 700]
    capsys.readouterr()
    assert main([str(w) for w in (*words, "--device", "cpu", "--out", tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "called at 700, below the noisiest timestep, 1000" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_null_prompt_of_sana_follows_no_instruction(folders):
    model = load(folders["sana"])
    both, null = model.encode([PROMPTS[0], ""]), model.pipeline.encode_prompt(PROMPTS[0], device="cpu")[2:]
    torch.testing.assert_close([v[1:] for v in both.values()], list(null))
    torch.testing.assert_close(map_cond(lambda v: v[:1], both), model.encode(PROMPTS[:1]))


@torch.no_grad()
def test_features_are_the_picture_s_tokens_in_their_places(model):
    """Every block's; a change in one corner of x shows there first."""
    x, index = randn(model.shape(1, families.SIZE), generator()), torch.tensor([500.0])
    found = model.features(model.net, x, index, model.null)
    patch = model.net.config.patch_size if "sana" in model.name else 2
    side = 16 // patch
    assert len(found) == 2 and all(f.shape[0] == 1 and f.shape[2:] == (side, side) for f in found)
    x[..., -patch:, :patch] += 1
    changed = (model.features(model.net, x, index, model.null)[0] - found[0]).abs().mean(1)[0]
    assert changed.argmax() == side * (side - 1)


def test_pictures_are_decoded_one_by_one(model):
    """At 1024 pixels the autoencoder's memory is the largest; with gradients, as ever."""
    calls = []
    handle = model.parts["vae"].decoder.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    x0 = randn(model.shape(3, families.SIZE), generator()).requires_grad_()
    pictures = model.decode(x0)
    handle.remove()
    assert calls == [1, 1, 1] and pictures.shape == (3, 3, families.SIZE, families.SIZE)
    pictures.square().mean().backward()
    assert x0.grad.any()
    with torch.no_grad():
        torch.testing.assert_close(model.to_latents(pictures[:1]), model.to_latents(pictures)[:1])
