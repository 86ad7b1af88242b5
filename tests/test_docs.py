"""What the documentation says is so: links lead somewhere, code runs, commands parse, names exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = [p for where in ("", "docs/", "web/docs/", "notebooks/") for p in ROOT.glob(f"{where}*.md")]
SCHEMES = ("http://", "https://", "mailto:")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.sub(r"^    .*$", "", text, flags=re.M)


# --------------------------------------------------------------------------------------------------------- links


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`]*`", "", prose(page))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\bsrc="([^"]+)"', text)
    return [link for link in found if not link.startswith(SCHEMES)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link} is not there"
        assert target.is_relative_to(ROOT), f"{name(page)}: {link} leads out of the repository"
        assert not anchor or anchor in anchors(target), f"{name(page)}: no heading for {link}"


def test_every_page_of_docs_can_be_found():
    listed = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs/README.md")}
    assert {p.resolve() for p in ROOT.glob("docs/*.md")} - {ROOT / "docs/README.md"} <= listed


# ---------------------------------------------------------------------------------------------------------- code


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    """The Python blocks of a page, one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks(page):
        exec(compile(block, name(page), "exec"), names)  # noqa: S102 (our own pages)


def commands(page: Path) -> list[str]:
    """Lines of code and words in the text that call `distill`."""
    text = page.read_text(encoding="utf-8")
    lines = [part.strip() for line in re.findall(r"^ {4,}(.*)$", text, re.M) for part in line.split("&&")]
    lines += re.findall(r"`([^`\n]+)`", text)
    return [line for line in lines if re.match(r"distill +[a-z]", line)]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name)
def test_commands_parse(page, capsys):
    """As written, or with --help where a command is only named."""
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        try:
            parse([*words, *(["--help"] if len(words) == 1 else [])])
        except SystemExit as stopped:
            assert stopped.code == 0, f"{name(page)}: {line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    for script in re.findall(r"python (\w+/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), f"{name(page)}: {script}"
    for module in re.findall(r"python -m (distill[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{name(page)}: {module}"
    for path in re.findall(r"`((?:distill|nodes|tests|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), f"{name(page)}: {path}"


# --------------------------------------------------------------------------------------------------------- names


def test_theory_explains_every_readout():
    """What `distill train` logs is in the tables of "When it goes wrong"."""
    from distill import losses, schedule
    from distill.toy import Gaussian

    x = torch.randn(4, 2, 3, 3)
    teacher, coach = (Gaussian(m, 1.0, schedule.flow())(x, torch.full((4,), 0.5)) for m in (0.0, 1.0))
    logged = {*losses.health(x, teacher, coach), "coach_ratio", "coach_loss", "student_loss", "student_grad_norm"}
    text = (ROOT / "docs/theory.md").read_text(encoding="utf-8").partition("## When it goes wrong")[2]
    told = set(re.findall(r"`(\w+)`", text))
    assert {readout for readout in logged if not readout.endswith("_1")} <= told  # of the channels the first one


def test_tables_are_those_that_the_benchmarks_wrote():
    """Rows of docs/figures.md against the JSON files beside it."""
    text = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
    table = {cells[0].lstrip("| "): cells[1:] for line in text.splitlines() if len(cells := line.split(" | ")) > 2}
    read = {name: json.loads((ROOT / f"docs/{name}.json").read_text()) for name in ("coach", "four_bit_speed")}
    assert f"{read['coach']['minutes']:g} minutes each" in text
    for name, row in read["coach"]["rows"].items():
        assert {f"{row['accuracy']:.3g}", f"{row['frechet']:.3g}"} <= set(table[name]), name
    for name, row in read["four_bit_speed"]["times"]["1"].items():
        low, middle, high = row["ratio"]
        assert table[name][0] == f"{middle:.2f} ({low:.2f} to {high:.2f})", name


def test_project_files_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {project['project']['version']}\n" in citation
    assert f"repository-code: {project['project']['urls']['Repository']}\n" in citation
    assert f"## {project['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()
    floor = project["project"]["requires-python"].removeprefix(">=")
    assert f"Python {floor} or later" in (ROOT / "README.md").read_text()
    icon = ROOT / project["tool"]["comfy"]["Icon"].partition("/main/")[2]
    assert Image.open(icon).size == (400, 400)  # the registry's largest


def test_constraints_pin_what_the_extras_name():
    """`pip install -c constraints.txt` leaves no direct dependency of the tests to chance."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {
        re.match(r"[\w-]+", spec)[0] for extra in ("distill", "quant", "notebooks", "test") for spec in extras[extra]
    }
    assert wanted - {"onestep"} <= pinned
