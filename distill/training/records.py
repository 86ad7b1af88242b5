"""What a training run tells while it runs: log.csv, sheets of pictures, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import replace, write_beside
from ..shards import hashed

if TYPE_CHECKING:
    from PIL.Image import Image


class Recorder:
    """Something that is told of a run; the base keeps nothing."""

    def row(self, step: int, logs: dict[str, float]) -> None:
        """Readouts after a step, means since the last row; {} on steps without one."""

    def sheet(self, step: int, picture: Image) -> None:
        """A sheet of pictures after a step."""


class Table(Recorder):
    """log.csv: readouts by step, whole after a kill. New columns may appear at any time; rows after `step` are dropped
    on resuming."""

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

    def row(self, step: int, logs: dict[str, float]) -> None:
        if not logs:
            return
        row = {"step": step, **{k: f"{v:.6g}" for k, v in logs.items()}}
        if new := [k for k in row if k not in self.columns]:
            rows = self.read() if self.path.exists() else []
            self.columns += new
            self.write([{k: r.get(k, "") for k in self.columns} for r in rows])
        elif not self.path.exists():
            self.write([])
        with self.path.open("a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow(row)


class Sheets(Recorder):
    """sheets/000100.png."""

    def __init__(self, folder: Path):
        self.folder = folder

    def sheet(self, step: int, picture: Image) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_beside(self.folder / f"{step:06d}.png", lambda temporary: picture.save(temporary, "PNG"))


class TensorBoard(Recorder):
    """torch's own writer; raises ImportError where TensorBoard is not installed."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)

    def row(self, step: int, logs: dict[str, float]) -> None:
        for name, value in logs.items():
            self.board.add_scalar(name, value, step)

    def sheet(self, step: int, picture: Image) -> None:
        import numpy as np

        self.board.add_image("sheet", np.asarray(picture), step, dataformats="HWC")


class WandB(Recorder):
    """Weights & Biases, by accelerate's tracker; a resumed run goes on with its curve. about: options of the run."""

    def __init__(self, out: Path, about: Mapping[str, Any]):
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ImportError("tracker wandb needs its package: pip install wandb", name="wandb") from None
        from accelerate.tracking import WandBTracker

        name = out.absolute().name
        run_id = f"{name}-{hashed(str(out.absolute()))}"  # the same when the run is resumed
        self.tracker = WandBTracker("onestep", dir=str(out), id=run_id, name=name, resume="allow")
        if hasattr(self.tracker, "start"):  # accelerate before 1.11 starts by itself
            self.tracker.start()
        self.tracker.store_init_configuration(dict(about))

    def row(self, step: int, logs: dict[str, float]) -> None:
        if logs:
            self.tracker.log(logs, step=step)

    def sheet(self, step: int, picture: Image) -> None:
        self.tracker.log_images({"sheet": [picture]}, step=step)


def recorders(out: Path, step: int, tracker: str, about: Mapping[str, Any]) -> list[Recorder]:
    """log.csv, sheets/, TensorBoard where it is installed, and the tracker that is asked for. step: where it starts."""
    out.mkdir(parents=True, exist_ok=True)
    found: list[Recorder] = [WandB(out, about)] if tracker == "wandb" else []
    found += [Table(out / "log.csv", step), Sheets(out / "sheets")]
    try:
        return [*found, TensorBoard(out / "tensorboard", step)]
    except ImportError:
        return found
