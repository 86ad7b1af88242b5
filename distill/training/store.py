"""What a training run leaves on disk: checkpoints that are whole or absent, and a CSV that survives a kill.

A checkpoint is one safetensors file: tensors by name, everything else as JSON in its metadata. It is written beside its
place, synced and renamed, so a process killed at any moment leaves either the old set of files or the new one.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..atomic import clean, replace, write_beside

PATTERN = "step-*.safetensors"


# ------------------------------------------------------------------------------------------------- checkpoints


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """folder/step-00001234.safetensors; then removes all but the newest `keep`."""
    from safetensors.torch import save_file

    path = folder / f"step-{step:08d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    write_beside(path, lambda temporary: save_file(tensors, temporary, {"onestep.train": json.dumps(state)}))
    for old in checkpoints(folder)[keep:]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted(folder.glob(PATTERN), reverse=True)


def load(folder: Path) -> tuple[dict[str, Tensor], dict, Path] | None:
    """The newest readable checkpoint, on the CPU; None if there is none. An unreadable one is passed over, loudly.

    Temporary files that a killed process left are removed.
    """
    from safetensors import SafetensorError, safe_open

    clean(folder)
    for path in checkpoints(folder):
        try:
            with safe_open(path, framework="pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["onestep.train"]), path
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path} cannot be read ({error}); trying the one before it", stacklevel=2)
    return None


# ---------------------------------------------------------------------------------------------------- readouts


class Table:
    """A CSV of readouts by step. New columns may appear at any time; rows after `step` are dropped on resuming."""

    def __init__(self, path: Path, step: int = 0):
        self.path, self.columns = path, ["step"]
        if path.exists():
            rows = self.read()
            self.columns = list(rows[0]) if rows else ["step"]
            self.write([r for r in rows if int(r["step"]) <= step])

    def read(self) -> list[dict[str, str]]:
        """The whole rows (a kill may have cut the last one)."""
        with self.path.open(newline="") as f:
            return [r for r in csv.DictReader(f) if None not in r.values() and None not in r and r["step"].isdigit()]

    def write(self, rows: list[dict]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        replace(self.path, text.getvalue().encode())

    def append(self, step: int, logs: dict[str, float]) -> None:
        row = {"step": step, **{k: f"{v:.6g}" for k, v in logs.items()}}
        if new := [k for k in row if k not in self.columns]:
            rows = self.read() if self.path.exists() else []
            self.columns += new
            self.write([{k: r.get(k, "") for k in self.columns} for r in rows])
        elif not self.path.exists():
            self.write([])
        with self.path.open("a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow(row)


def writers(out: Path, step: int) -> list[Callable[[int, dict], None]]:
    """log.csv, and TensorBoard where it is installed."""
    out.mkdir(parents=True, exist_ok=True)
    table = Table(out / "log.csv", step)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return [table.append]
    board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            board.add_scalar(name, value, step)

    return [table.append, write]
