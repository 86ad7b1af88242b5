"""Make the notebooks from their sources.

    python notebooks/build.py            those that are out of date; where only words changed, nothing is run
    python notebooks/build.py 05 10      these chapters, whatever their state
    python notebooks/build.py --all      all of them
    python notebooks/build.py --check    make nothing; say which do not belong to their source (exit status 1)

A source is a Python file in jupytext's percent format. Its notebook holds the same cells, what they put out, and two
marks in its metadata: the SHA-256 of the source, and that of the bundled models where the source draws with them, so
that new weights put exactly those chapters out of date.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
LARGEST = 1_200_000  # bytes a notebook: GitHub's viewer gives up on large ones
SECONDS = 600  # a cell
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    """The chapters' sources in their order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def marks(source: Path) -> dict[str, str]:
    """What the notebook of a source must carry."""
    from distill import bundled

    text = source.read_text("utf-8")
    found = {"source": hashlib.sha256(text.encode()).hexdigest()}
    used = sorted(set(re.findall(r'bundled\("(\w+)"\)', text)))
    if used:
        found["models"] = hashlib.sha256(b"".join(bundled(name).read_bytes() for name in used)).hexdigest()
    return found


def parse(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, with nothing run."""
    notebook = jupytext.read(source, fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"{source.stem[:2]}-{i:02d}", {}
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}, "onestep": marks(source)}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def run(source: Path, fast: bool = False) -> nbformat.NotebookNode:
    """The notebook of a source, run from top to bottom with still pictures in place of widgets.

    Raises nbclient's CellExecutionError for a cell that fails, ValueError for one that warns.
    """
    notebook = parse(source)
    kept = notebook.metadata
    setting = {"ONESTEP_STATIC": "1", "ONESTEP_FAST": "1" if fast else "0", "TQDM_DISABLE": "1"}
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": HERE}})
    client.execute(env=os.environ | setting, cwd=str(HERE))
    notebook.metadata = kept
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise ValueError(f"{source.name}: a cell warns: {output.text[:500]}")
    return notebook


def problem(source: Path) -> str | None:
    """Why the notebook beside a source does not belong to it; None where it does."""
    path = source.with_suffix(".ipynb")
    if not path.is_file():
        return "there is no notebook"
    if path.stat().st_size > LARGEST:
        return f"{path.stat().st_size} bytes, more than {LARGEST}"
    notebook, wanted = nbformat.read(path, 4), parse(source)
    for mark, value in wanted.metadata.onestep.items():
        if notebook.metadata.get("onestep", {}).get(mark) != value:
            return {"source": "made from another source", "models": "made with other bundled models"}[mark]
    if [(c.cell_type, c.source) for c in notebook.cells] != [(c.cell_type, c.source) for c in wanted.cells]:
        return "its cells are not those of the source"
    if any(c.cell_type == "code" and c.execution_count is None for c in notebook.cells):
        return "not all of its cells were run"
    return None


def retold(source: Path) -> nbformat.NotebookNode | None:
    """The notebook of a source with the outputs of the one beside it, where only words changed since; else None."""
    path, new = source.with_suffix(".ipynb"), parse(source)
    if not path.is_file():
        return None
    old = nbformat.read(path, 4)
    before, after = ([c for c in n.cells if c.cell_type == "code"] for n in (old, new))
    models = [n.metadata.get("onestep", {}).get("models") for n in (old, new)]
    if [c.source for c in before] != [c.source for c in after] or models[0] != models[1]:
        return None
    for a, b in zip(after, before):
        a.outputs, a.execution_count = b.outputs, b.execution_count
    return None if any(c.execution_count is None for c in after) else new


def write(source: Path, again: bool = True) -> None:
    """Write the notebook of a source: run, or, unless `again`, with the outputs it has where only words changed. Raises
    ValueError where it is too large."""
    start = time.monotonic()
    print(f"{source.stem} ...", end=" ", flush=True)
    text = nbformat.writes((None if again else retold(source)) or run(source)) + "\n"
    if len(text.encode()) > LARGEST:
        raise ValueError(f"{source.name}: {len(text.encode())} bytes with its outputs, more than {LARGEST}: show less")
    source.with_suffix(".ipynb").write_text(text, "utf-8")
    print(f"{time.monotonic() - start:.0f} s, {len(text) / 1000:.0f} kB", flush=True)


def picture() -> None:
    """course.png, for the map: the first picture of some chapters, side by side."""
    shown = []
    for chapter, height in (("04", 220), ("05", 220)):
        (path,) = HERE.glob(f"{chapter}_*.ipynb")
        outputs = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", [])]
        data = next(o.data["image/png"] for o in outputs if "image/png" in o.get("data", {}))
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        shown.append(image.resize((image.width * height // image.height, height), Image.Resampling.LANCZOS))
    page = Image.new("RGB", (max(i.width for i in shown), sum(i.height for i in shown)), "white")
    for i, image in enumerate(shown):
        page.paste(image, (0, sum(j.height for j in shown[:i])))
    page.save(HERE / "course.png", optimize=True)


def main(arguments: list[str]) -> int:
    """The command; its exit status."""
    if "--check" in arguments:
        found = {s.name: why for s in sources() if (why := problem(s))}
        for name, why in found.items():
            print(f"{name}: {why}. Run `python notebooks/build.py`.")
        return 1 if found else 0
    named = [s for s in sources() if any(s.name.startswith(a) for a in arguments if a != "--all")]
    if not named and (unknown := [a for a in arguments if a != "--all"]):
        print(f"no chapter {', '.join(unknown)}; there are {', '.join(s.stem for s in sources())}")
        return 2
    for source in named or sources():
        if named or "--all" in arguments or problem(source):
            write(source, again=bool(named) or "--all" in arguments)
    if HERE == Path(__file__).parent:
        picture()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
