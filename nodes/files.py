"""Where model files are: what the widgets offer, and the path of a choice."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..distill.header import CheckpointError
from ..distill.tutorial.bundled import bundled

DIFFUSION = ("diffusion_models", "checkpoints")
TEXT = ("text_encoders",)
BUNDLED = {f"bundled: {name}": name for name in ("student", "teacher")}
EXTENSIONS = {".safetensors", ".sft", ".gguf"}
LONGEST = 255  # bytes of a file's name, on all usual file systems

for name in (*DIFFUSION, *TEXT):  # ComfyUI lists no .gguf; these lists share its folders, present and future
    folder_paths.folder_names_and_paths[f"onestep_{name}"] = (folder_paths.folder_names_and_paths[name][0], EXTENSIONS)


def choices(folders: tuple[str, ...], extensions: tuple[str, ...] = (".safetensors",), bundled: bool = False) -> list:
    """The bundled models where asked for, then every file with one of the extensions."""
    files = [name for folder in folders for name in folder_paths.get_filename_list(f"onestep_{folder}")]
    return [*(BUNDLED if bundled else ()), *dict.fromkeys(name for name in files if name.endswith(extensions))]


def locate(file: str, folders: tuple[str, ...] = DIFFUSION) -> Path:
    """A choice of the widget -> its path. Raises CheckpointError naming the folders where there is none."""
    if file in BUNDLED:
        return bundled(BUNDLED[file])
    for folder in folders:
        path = folder_paths.get_full_path(f"onestep_{folder}", file)
        if path is not None:
            return Path(path)
    places = " or ".join(place(folder) for folder in folders)
    raise CheckpointError(f"{file}: no such file in {places}. Put it there, or choose another file.")


def place(folder: str) -> str:
    """Where a file of that kind belongs. (ComfyUI has older names for some folders, too.)"""
    paths = folder_paths.get_folder_paths(folder)
    return next((p for p in paths if Path(p).name == folder), paths[0])


def check_target(path: Path) -> None:
    """Raise CheckpointError where a file cannot come to a path: for its name, or for a folder that is read only. What
    takes minutes asks this first."""
    for part in path.parts:
        if len(part.encode()) > LONGEST or "\0" in part:
            size = f"a name of {len(part.encode())} bytes" if "\0" not in part else "a name with a zero byte"
            raise CheckpointError(f"{part[:40]!r}...: {size}. Give one below {LONGEST - 20}, of letters.")
    above = next(p for p in path.absolute().parents if p.is_dir())
    if not os.access(above, os.W_OK):
        raise CheckpointError(f"{above}: read only. Make it writable, or give ComfyUI another folder.")


def fingerprint(file: str | None, folders: tuple[str, ...] = DIFFUSION) -> tuple | None:
    """Changes when the file is written again. A name that another node still has to give is that node's affair."""
    if file is None:
        return None
    stat = locate(file, folders).stat()
    return file, stat.st_mtime_ns, stat.st_size
