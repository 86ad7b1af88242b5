"""Prompts from a file (.txt, .jsonl, .csv, .parquet) or a dataset of the hub."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

COLUMNS = ("prompt", "caption", "text", "description")
"""What a column of prompts is called, in the order in which it is guessed."""
Row = tuple[int, Any]
"""A line's number, from 1, and what stands there: text, or an object with columns."""


def read_prompts(source: str | Path, column: str | None = None) -> list[str]:
    """The prompts of a file or a dataset, in order; empty ones are skipped.

    source: .jsonl (strings, or objects with columns), .csv, .parquet, any other file with one prompt a line, or the
    name of a Hugging Face dataset, whose training split is read. column: which one; default a guess, which is logged.
    Raises ValueError that names the line for what is no prompt, and for a source without any; FileNotFoundError.
    """
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a file of prompts. Write one prompt a line.")
    read = READERS.get(path.suffix.lower())
    if read is None and not path.exists() and len(path.parts) == 2 and path.suffix != ".txt":
        rows: Iterator[Row] = _dataset(str(source))
    else:
        rows = (read or _text)(path)
    prompts = [text for row in _texts(rows, source, column) if (text := row.strip())]
    if not prompts:
        raise ValueError(f"{source}: no prompts in it. Write one prompt a line.")
    return prompts


def _texts(rows: Iterable[Row], source: str | Path, column: str | None) -> Iterator[str]:
    """The prompt of each row."""
    for number, row in rows:
        if isinstance(row, dict):
            column = column or _guess(row, source)
            if column not in row:
                raise ValueError(f"{source}: line {number}: no column {column!r}; there are {', '.join(map(str, row))}")
            row = row[column]
        if not isinstance(row, str):
            raise ValueError(f"{source}: line {number}: {row!r:.60} is no prompt: text is needed. Mend or remove it.")
        yield row


def _guess(row: dict, source: str | Path) -> str:
    """The column that holds prompts: by its name, or the only one with text."""
    names = {name.lower(): name for name in row if isinstance(name, str)}
    found = [names[name] for name in COLUMNS if name in names] or [k for k, v in row.items() if isinstance(v, str)]
    if not found or (len(found) > 1 and found[0].lower() not in COLUMNS):
        raise ValueError(f"{source}: which column holds the prompts? Name it by --column: {', '.join(map(str, row))}")
    log.warning("%s: prompts are read from the column %r; --column names another", source, found[0])
    return found[0]


def _text(path: Path) -> Iterator[Row]:
    """Lines, whatever they end with. Raises ValueError for one that is not UTF-8."""
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise ValueError(f"{path}: line {number}: not UTF-8 text. Save the file as UTF-8.") from None


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _text(path):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"{path}: line {number}: not JSON. Write one string or object a line.") from None


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader((f"{line}\n" for _, line in _text(path)), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"not the {len(reader.fieldnames or ())} fields of the first line")
            yield reader.line_num, row
    except csv.Error as e:
        raise ValueError(f"{path}: line {reader.reader.line_num}: {e}. Put quotes around text with commas.") from None


def _parquet(path: Path) -> Iterator[Row]:
    """The columns of text, row group after row group, so that not all is in memory."""
    with path.open("rb") as f:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ImportError(f"{path}: reading parquet needs pyarrow: pip install pyarrow", name="pyarrow") from None
        try:
            file = ParquetFile(f)
            words = [c.name for c in file.schema_arrow if "string" in str(c.type)]
            batches = file.iter_batches(columns=words)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        except ArrowException as e:
            raise ValueError(f"{path}: not a sound parquet file: {e}. Download it again.") from None


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _dataset(name: str) -> Iterator[Row]:
    """The training split of a dataset of the hub, or of the copy that is on this machine."""
    instead = "Offline, save its prompts as .parquet, .csv, .jsonl or .txt and give that file"
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"{name}: no such file; to read a dataset of this name: pip install datasets. {instead}.", name="datasets"
        ) from None
    try:
        rows = load_dataset(name, split="train")
    except Exception as e:  # of many kinds: no network, no such name, no such split, a gate
        reason = (str(e) or type(e).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{name}: neither a file, nor a dataset that can be had: {reason}. {instead}.") from None
    words = [name for name, kind in rows.features.items() if "string" in str(getattr(kind, "dtype", ""))]
    yield from enumerate(rows.select_columns(words), 1)
