"""What holds for every family: it is what its diffusers pipeline is, and its students come back as they went."""

from contextlib import contextmanager

import families
import pytest
import torch
import torch.nn.functional as F

from distill.adapters import Lora
from distill.backbones import load
from distill.backbones.adapted import adapted
from distill.backbones.base import Backbone
from distill.backbones.flux import Flux
from distill.backbones.folder import takes_loras
from distill.backbones.saving import how_to_call, scheduler_of
from distill.cli import console, main
from distill.denoiser import guided
from distill.file import lora
from distill.methods.vsd import VSDOptions
from distill.sample import solve
from distill.schedule import randn
from distill.training.batches import prompt_batches
from distill.training.options import TrainOptions
from distill.training.store import load as load_state
from distill.training.students import train_student

VARIANTS = ("schnell", "sigma")
"""Of a family that is trained here already."""
PROMPTS = ["a small red ring", "a large blue square, top left"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(ours, theirs, atol=1e-4):
    """Equal, measured by the largest number."""
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=atol)


@pytest.fixture(scope="module", params=families.FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    families.FAMILIES[request.param](path)
    return path


@pytest.fixture(scope="module")
def teacher(folder):
    return load(folder)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Pictures of families.SIZE, where no size is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Backbone, Flux):
            shape = kind.shape
            patch.setattr(kind, "shape", lambda self, n, size=None, shape=shape: shape(self, n, size or families.SIZE))
        yield


def pipeline(path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def euler(scheduler):
    """The scheduler whose steps are ours: DDIM's, on a flow schedule Euler's."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    if scheduler.config.get("use_flow_sigmas"):
        return FlowMatchEulerDiscreteScheduler(shift=scheduler.config.flow_shift)
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_a_teacher_is_what_its_pipeline_is(folder, teacher, guidance):
    """The same latents from the same noise at four steps of the same scheduler, with guidance and without."""
    pipe = pipeline(folder)
    pipe.scheduler = euler(pipe.scheduler)
    z = randn(teacher.shape(2), generator())
    theirs = families.ask(pipe, z, PROMPTS, guidance, num_inference_steps=4, output_type="latent")
    times = [teacher.time(float(t)) for t in pipe.scheduler.timesteps]
    denoiser = guided(teacher.denoiser, guidance, teacher.null)
    close(solve(denoiser, z, teacher.encode(PROMPTS), solver="ddim", times=times), theirs)


@torch.no_grad()
def test_a_student_comes_back_as_it_went(folder, teacher, tmp_path):
    """As the file or folder that its family has, freed text encoders included."""
    changed = load(folder)
    z = randn(teacher.shape(2), generator())
    before = changed.decode(changed.latents(z, changed.encode(PROMPTS), steps=1, guidance=1.0))
    changed.free(*(name for name in changed.parts if name.startswith("text_encoder") and not changed.in_comfyui))
    path = changed.save_student(tmp_path / "s.safetensors", changed.net, dtype=torch.float32, method="vsd")
    student = load(path)
    assert path.is_dir() != teacher.in_comfyui
    assert (student.meta.method, student.meta.teacher, student.meta.guidance["baked"]) == ("vsd", folder.name, True)
    close(student.sample(PROMPTS, generator()), before)


def by_tokens(shape, generator, device):
    """As `randn`, drawn in the order of FLUX's tokens, each 2x2 latents."""
    n, channels, h, w = shape
    tokens = randn((n, h * w // 4, 4 * channels), generator, device)
    return F.pixel_shuffle(tokens.mT.unflatten(2, (h // 2, w // 2)), 2)


@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_its_folder_is_a_pipeline_that_draws_what_it_draws(teacher, tmp_path, monkeypatch, steps):
    """With the scheduler that lies in it, at its steps and without guidance; named by nothing of this machine."""
    if isinstance(teacher, Flux):  # its pipeline draws the noise between two steps by tokens
        monkeypatch.setattr("distill.sample.randn", by_tokens)
    path = teacher.save_folder(
        tmp_path / "student", teacher.net, torch.float32, method="vsd", steps=steps, teacher="t",
        guidance=teacher.meta.guidance | {"baked": True},
    )  # fmt: skip
    student, pipe = load(path), pipeline(path)
    z = randn(student.shape(2), generator())
    ours = student.decode(student.latents(z, student.encode(PROMPTS), generator=generator(1)))
    how = how_to_call(student.meta) | {"output_type": "pt", "generator": generator(1)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # some pipelines keep the generator from their scheduler
        close(families.ask(pipe, z, PROMPTS, **how) * 2 - 1, ours)
    text = " ".join(f.read_text() for f in path.rglob("*") if f.suffix in (".json", ".md"))
    assert str(tmp_path) not in text and "vsd" in (path / "README.md").read_text()


@torch.no_grad()
def test_diffusers_adds_a_lora_student_s_file_and_draws_the_same(folder, teacher, tmp_path):
    """The file as it is trained, on every layer that the family adapts; PixArt's pipelines take none."""
    made = Lora(teacher.net, rank=2, targets=teacher.lora_targets(), generator=generator())
    for p in made.parameters():
        p += 0.05 * torch.randn(p.shape, generator=generator(p.numel()))
    path = teacher.save_student(tmp_path / "l.safetensors", made.module, method="vsd")
    student, pipe = adapted(teacher, lora.read(path), path), pipeline(folder)
    assert hasattr(pipe, "load_lora_weights") == takes_loras([type(pipe).__name__]) == ("PixArt" not in str(type(pipe)))
    if not takes_loras([type(pipe).__name__]):
        return
    pipe.scheduler = scheduler_of(student.meta)
    pipe.load_lora_weights(path)
    z = randn(student.shape(2), generator())
    theirs = families.ask(pipe, z, PROMPTS, **how_to_call(student.meta), output_type="pt") * 2 - 1
    close(student.decode(student.latents(z, student.encode(PROMPTS))), theirs)
    plain = student.decode(teacher.wrap(teacher.net)(z, torch.ones(2), teacher.encode(PROMPTS)))
    assert not torch.allclose(plain, theirs, atol=0.01)


# ------------------------------------------------------------------------------------------------------- training


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


trained = pytest.mark.parametrize("folder", [f for f in families.FAMILIES if f not in VARIANTS], indirect=True)


@trained
@pytest.mark.parametrize("coach", ["lora", "copy"])
def test_student_and_coach_move_and_the_teacher_does_not(folder, coach, tmp_path):
    teacher = load(folder)
    before = weights(teacher.net)
    options = VSDOptions(coach=coach, rank=2, lr=1e-3)
    training = TrainOptions(steps=2, ema=0.0, save_every=1, max_spread=1e4)
    *_, last = train_student(teacher, options, prompt_batches(teacher, PROMPTS, 2), training, tmp_path)
    assert torch.equal(weights(teacher.net), before)
    assert not torch.equal(weights(last.ema), before) and weights(last.ema).isfinite().all()
    saved = {k: v for k, v in load_state(tmp_path / "checkpoints")[0].items() if k.startswith("coach/")}
    moved = [v for k, v in saved.items() if "lora_B" in k] if coach == "lora" else list(saved.values())
    if coach == "lora":
        assert sum(bool(v.any()) for v in moved) >= len(moved) - 1  # SD3's last block has queries that nobody reads
    else:
        assert not torch.equal(torch.cat([v.flatten() for v in moved]), before)


@trained
def test_a_run_that_is_stopped_goes_on_and_its_student_opens(folder, tmp_path, monkeypatch, capsys):
    """Through the command line; bitwise what a run that was never stopped makes."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["train", "vsd", "--teacher", folder, "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--rank", 2]
    words += ["--batch-size", 2, "--device", "cpu", "--save-every", 1, "--lr", 1e-3, "--ema", 0.1, "--max-spread", 1e4]

    def run(out, *more):
        return main([str(w) for w in (*words, "--out", tmp_path / out, *more)])

    assert run("whole") == 0

    @contextmanager
    def stopping():
        def told(what, share, **readouts):
            if what == "vsd":
                raise KeyboardInterrupt

        yield told

    with monkeypatch.context() as patch:
        patch.setattr(console, "bars", stopping)
        assert run("stopped") == 130
    assert run("stopped", "--resume") == 0
    path = next((tmp_path / "stopped").glob("student*"))
    whole, student = load(tmp_path / "whole" / path.name), load(path)
    assert torch.equal(weights(whole.net), weights(student.net))
    assert not torch.equal(weights(whole.net), weights(load(folder).net))
    assert student.meta.guidance["baked"] and student.meta.config["prompts"] == "prompts.txt"
    capsys.readouterr()
    assert main(["info", str(path)]) == 0 and "method  vsd" in capsys.readouterr().out
    assert main(["sample", PROMPTS[0], "--model", str(path), "--out", str(tmp_path / "p.png")]) == 0
