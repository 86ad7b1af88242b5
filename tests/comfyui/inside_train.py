"""Checks of inside.py: OneStepTrainStudent, as ComfyUI calls it: in inference mode, with Cancel, without packages."""

import os
import sys
import tempfile
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from inside_helpers import FOLDER, error, image, native
from inside_setup import imported

train, demo, losses = imported("nodes.train"), imported("distill.tutorial.demo"), imported("distill.losses")
load, bundled = imported("distill.backbones").load, imported("distill.tutorial.bundled").bundled
guided, build_pairs = imported("distill.denoiser").guided, imported("distill.methods.pairs").build_pairs
shape_batches = imported("distill.tutorial.prompts").shape_batches


class Bar:
    """In place of ComfyUI's."""

    def __init__(self, total: int):
        self.seen = []
        Bar.last = self

    def update_absolute(self, value: int, total=None, preview=None) -> None:
        self.seen.append((value, preview))


def run(name: str, minutes: float = 0.12, **changes) -> tuple:
    """The node's outputs, with models and temporary files in a folder of its own (deleted at exit)."""
    folder = tempfile.TemporaryDirectory()
    run.folders.append(folder)
    folder_paths.folder_names_and_paths["diffusion_models"] = ([f"{folder.name}/diffusion_models"], {".safetensors"})
    folder_paths.set_temp_directory(folder.name)
    (Path(folder.name) / "temp").mkdir()
    bar, comfy.utils.ProgressBar = comfy.utils.ProgressBar, Bar
    given = {"teacher": "bundled: teacher", "folder": "", "prompts": "", "batch_size": 2} | changes
    try:
        with torch.inference_mode():
            return train.OneStepTrainStudent.execute(minutes=minutes, name=name, training_seed=0, **given).args
    finally:
        comfy.utils.ProgressBar = bar


run.folders = []


def check_a_student_is_trained_in_the_graph_and_usable_at_once():
    model, clip, vae, said = run("mine")
    values, previews = zip(*Bar.last.seen)
    assert list(values) == sorted(values) and values[-1] >= 990, values
    shown = [p for p in previews if p is not None]
    assert shown and shown[-1][1].size[0] >= 256
    latent = image(model, clip)
    assert latent.isfinite().all() and vae.decode(latent).shape[-1] == 3 and said.startswith("mine.safetensors: ")
    file = Path(folder_paths.get_folder_paths("diffusion_models")[0]) / "mine.safetensors"
    again, clip, _ = native.load(file, [])
    assert error(image(again, clip), latent) < 1e-6
    assert train.target("mine").name == "mine-2.safetensors"


def cancelled(name: str, steps: int) -> Path:
    """The file of a run on few pairs in small batches in which Cancel was pressed after so many steps."""
    show, options, batch, seen = train.Page.show, demo.RegressionOptions, demo.BATCH, []

    def pressed(self, step):
        seen.append(step.step)
        if len(seen) == steps:
            mm.interrupt_current_processing()
        show(self, step)

    train.Page.show, demo.BATCH = pressed, 8
    demo.RegressionOptions = lambda **given: options(**given | {"pairs": 32, "pairs_minutes": None})
    try:
        run(name, minutes=5)
    except mm.InterruptProcessingException:
        pass
    else:
        raise AssertionError("it went on")
    finally:
        train.Page.show, demo.BATCH, demo.RegressionOptions = show, batch, options
        mm.interrupt_current_processing(False)
    assert seen == list(range(1, steps + 1)), seen
    return Path(folder_paths.get_folder_paths("diffusion_models")[0]) / f"{name}.safetensors"


def check_cancel_leaves_a_usable_student():
    model, clip, _ = native.load(cancelled("stopped", steps=2), [])
    assert image(model, clip).isfinite().all()
    left = [p.name for p in Path(folder_paths.get_temp_directory()).rglob("onestep-train-*")]
    assert not left, left


def check_the_student_learns():
    """Called once, it comes closer than its teacher to where the teacher's solver goes from noise it never saw."""
    teacher, student = load(bundled("teacher")), load(cancelled("learned", steps=16))
    guide = guided(teacher.denoiser, teacher.meta.guidance["scale"], teacher.null)
    pairs = build_pairs(guide, shape_batches(teacher, 16), torch.Generator().manual_seed(1), count=16)
    z, cond, x0 = pairs.rows[range(16)].values()
    once = [m.denoiser(z, torch.full((16,), m.time()), cond) for m in (teacher, student)]
    before, after = (losses.regression(x, x0).item() for x in once)
    print(f"teacher called once {before:.3f}, student {after:.3f}")
    assert after < 0.9 * before, (before, after)


def check_what_is_missing_is_one_line():
    own = {"folder": str(FOLDER / "student.safetensors"), "prompts": "a red ring"}
    for package, given in (("accelerate", {}), ("peft", own)):
        held, sys.modules[package] = sys.modules.get(package), None
        try:
            run("nothing", **given)
        except ValueError as e:
            assert f"needs {package}, which ComfyUI does not bring: pip install" in str(e), e
        else:
            raise AssertionError(f"it trained without {package}")
        finally:
            sys.modules.pop(package)
            if held is not None:
                sys.modules[package] = held
    for name, says in (("../../out", "leads out of"), ("a\0b", "a zero byte"), ("\u2603" * 90, "a name of 282 bytes")):
        refused(name, says)
    access, os.access = os.access, lambda path, mode: False
    try:
        refused("new", "read only. Make it writable")
    finally:
        os.access = access


def refused(name: str, says: str):
    try:
        train.target(name)
    except ValueError as e:
        assert says in str(e), e
    else:
        raise AssertionError(f"{name!r} was no problem")
