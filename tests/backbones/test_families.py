"""What holds for every family: it is what its diffusers pipeline is, and its students come back as they went."""

import families
import pytest
import torch

from distill.backbones import load
from distill.backbones.folder import how_to_call
from distill.denoiser import guided
from distill.sample import solve
from distill.schedule import randn

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
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_a_teacher_is_what_its_pipeline_is(folder, teacher, guidance):
    """The same latents from the same noise at four steps of the same scheduler, with guidance and without."""
    pipe = pipeline(folder)
    pipe.scheduler = euler(pipe.scheduler)
    z = randn(teacher.shape(2), generator())
    how = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "latent"}
    theirs = pipe(PROMPTS, latents=z, **how).images
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


@pytest.mark.parametrize("steps", [1, 2])
@torch.no_grad()
def test_its_folder_is_a_pipeline_that_draws_what_it_draws(teacher, tmp_path, steps):
    """With the scheduler that lies in it, at its steps and without guidance; named by nothing of this machine."""
    path = teacher.save_folder(
        tmp_path / "student", teacher.net, torch.float32, method="vsd", steps=steps, teacher="t",
        guidance={"scale": 2.0, "baked": True},
    )  # fmt: skip
    student, pipe = load(path), pipeline(path)
    z = randn(student.shape(2), generator())
    ours = student.decode(student.latents(z, student.encode(PROMPTS), generator=generator(1)))
    how = how_to_call(student.meta) | {"output_type": "pt", "generator": generator(1)}
    close(pipe(PROMPTS, latents=z, **how).images * 2 - 1, ours)
    text = " ".join(f.read_text() for f in path.rglob("*") if f.suffix in (".json", ".md"))
    assert str(tmp_path) not in text and "vsd" in (path / "README.md").read_text()
