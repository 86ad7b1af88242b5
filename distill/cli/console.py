"""What the commands share: devices, outputs, progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import replace
from ..checks import need

if TYPE_CHECKING:
    import torch

    from ..backbones.base import Backbone


def pick_device(name: str) -> torch.device:
    """ "auto" takes a GPU where there is one, each of several processes its own. Raises ValueError for
    a device that this machine does not have."""
    import torch

    own = f":{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else ""
    there = ["cpu"]
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if name == "auto":
        name = there[0]
    if name == "cuda":
        name += own
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" can be made, but not read
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not there; this machine has {', '.join(there)}") from None
    return device


def open_teacher(name: str, device: str, dtype: str = "float32") -> Backbone:
    """A bundled teacher, a file or a folder. Raises CheckpointError, and ValueError for a student, which is no model of
    all noise levels."""
    import torch

    from ..backbones import load
    from ..tutorial.bundled import find

    teacher = load(find(name), pick_device(device), getattr(torch, dtype))
    teacher.name = named(find(name), teacher.name)
    made = teacher.meta.method
    need(made == "teacher", "teacher", teacher.name, f"a student, made by {made}; give what it was made of")
    return teacher


def named(path: Path, name: str) -> str:
    """What is said of a model to those that are made of it: its name; where a bundled model is called so and this one
    is another, with its folder's, so that nothing takes the two for one."""
    from ..tutorial.bundled import BUNDLED, bundled

    other = name in {f"{n}.safetensors" for n in BUNDLED} and path.resolve() != bundled(Path(name).stem).resolve()
    return f"{path.resolve().parent.name}/{name}" if other else name


def base_of(base: str | None, name: str, why: str) -> Path:
    """Where the model is that another was made of: `base` if given, else the bundled one of its name. Raises ValueError
    where there is none; why: the start of what it says."""
    from ..tutorial.bundled import BUNDLED, bundled, find

    if base is not None:
        return find(base)
    for path in map(bundled, BUNDLED):
        if path.name == name:
            return path
    raise ValueError(f"{why}: give the model it was made of{name and f', {name},'} as --base")


def open_model(name: str, device: str, base: str | None = None) -> Backbone:
    """Any model, a LoRA with its base. Raises CheckpointError, and ValueError where a base is missing or too much."""
    from ..backbones import load
    from ..backbones.adapted import adapted
    from ..file import lora
    from ..tutorial.bundled import find

    path = find(name)
    if not lora.is_lora(path):
        need(base is None, "base", base, f"{path} is no LoRA, which alone has one")
        return load(path, pick_device(device))
    held = lora.read(path)
    return adapted(load(base_of(base, held.base, f"{path} is a LoRA"), pick_device(device)), held, path)


def writable(path: Path, *, folder: bool = False, ending: str = "") -> None:
    """Raise ValueError where `path` cannot become a file, or a folder with files; nothing is made. A run that takes
    hours asks this first. ending: what its name ends with, so that figures are not written over a model."""
    need(path.suffix.lower() == ending or not ending, "the output", str(path), f"name a {ending} file")
    if path.is_dir() and not folder:
        raise ValueError(f"{path} is a folder: name a file to write")
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder to write to")
    above = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir() or p.is_file())
    if above.is_file() and above != path.absolute():
        raise ValueError(f"{path} cannot be written: {above} is a file")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission for {above}")


def write_json(path: Path, value: Any) -> None:
    """Write it whole, into a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(value, indent=2) + "\n").encode())


def refuse_existing(path: Path, force: bool) -> None:
    """Raise FileExistsError for an output that took time to make, unless it may be overwritten."""
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists: add --force to overwrite it, or name another file")


def refuse_run(out: Path, folders: Sequence[Path], resume: bool, force: bool = False) -> None:
    """Raise FileExistsError where a run would begin over another, or over the student of one that is gone.

    folders: where the run keeps its checkpoints/. force: overwrite such a student.
    """
    from ..training.store import checkpoints

    student = next((s for s in (out / "student.safetensors", out / "student") if s.exists()), None)
    held = any(checkpoints(folder / "checkpoints") for folder in folders)
    if held and not resume:
        raise FileExistsError(f"{out} holds a run: add --resume to go on with it, or name another folder")
    if student is not None and not held and not force:
        raise FileExistsError(f"{student} exists, without a run to go on with: name another folder, or move it away")


def is_main_process() -> bool:
    """False in all but the first process that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


SHOWN = ("student_loss", "coach_loss", "rel_gap", "coach_ratio", "x_std")


@contextmanager
def bars() -> Iterator[Callable[..., None]]:
    """told(what, share, **readouts): a bar for each `what`, so that its time left is that stage's. Where the output is
    no terminal, a line every tenth; in processes that are not the first, nothing."""
    if not is_main_process():
        yield lambda what, share, **readouts: None
        return
    show = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        yield show
    finally:
        show.close()


def _chosen(readouts: dict[str, float]) -> dict[str, str]:
    return {k: f"{readouts[k]:.4g}" for k in SHOWN if k in readouts}


class _Bars:
    def __init__(self) -> None:
        self.what, self.bar = "", None

    def __call__(self, what: str, share: float, **readouts: float) -> None:
        from tqdm import tqdm

        if what != self.what:
            self.close()
            layout = "{desc:<14}{percentage:3.0f}%|{bar:24}| {elapsed} left {remaining}{postfix}"
            self.what, self.bar = what, tqdm(total=1.0, desc=what, bar_format=layout, mininterval=0.5)
        self.bar.set_postfix(_chosen(readouts), refresh=False)
        self.bar.update(min(1.0, share) - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Lines:
    def __init__(self) -> None:
        self.what, self.tenths = "", 0

    def __call__(self, what: str, share: float, **readouts: float) -> None:
        if what != self.what:
            self.what, self.tenths = what, 0
        if int(10 * share) > self.tenths:
            self.tenths = int(10 * share)
            words = [f"{what}: {10 * self.tenths} %", *(f"{k} {v}" for k, v in _chosen(readouts).items())]
            print(", ".join(words), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Lines need none."""
