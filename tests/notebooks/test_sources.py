"""The course's sources: their form, their links, and that the notebooks beside them are theirs."""

from __future__ import annotations

import re

import pytest
from chapters import ROOT, SOURCES, build, prose

chapters = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)


def texts(source):
    return [c for c in build.parse(source).cells if c.cell_type == "markdown"]


def codes(source):
    return [c for c in build.parse(source).cells if c.cell_type == "code"]


@chapters
def test_the_notebook_belongs_to_its_source(source):
    """The bundled models it was drawn with may have changed since: `notebooks/build.py` draws it again."""
    assert build.problem(source) in (None, "made with other bundled models"), "run `python notebooks/build.py`"


@chapters
def test_cells_are_short(source):
    for cell in codes(source):
        assert cell.source.count("\n") < 30, cell.source[:80]
    for cell in texts(source):
        assert len(prose(cell).split()) <= 150, cell.source[:80]


@chapters
def test_every_chapter_has_its_parts(source):
    cells, everything = texts(source), source.read_text("utf-8")
    number = int(source.stem[:2])
    first, last = cells[0].source, cells[-1].source
    assert first.startswith(f"# {number}. ")
    badge = rf"colab\.research\.google\.com/github/onestep-diffusion/onestep/blob/main/notebooks/{source.stem}\.ipynb"
    assert re.search(badge, first)
    assert "**You will learn**" in first and re.search(r"\*\*Time:\*\*\s+\d+ minutes?", first)
    assert 'if "google.colab" in sys.modules' in codes(source)[0].source
    references = re.findall(r"^- .*\]\(https://", last, re.M)
    assert 3 <= len(references) <= 5, "three to five references, each with its address"
    assert "**Next:**" in last
    solutions = re.findall(r"<details><summary>Solution</summary>\n\n.+?\n</details>", cells[-2].source, re.S)
    assert len(solutions) >= 2, "exercises with hidden solutions, in the last cell but one"
    assert re.search(r"widgets\.(explore|dashboard|compare)\(", everything), "something to touch"
    assert everything.count("widgets.predict(") == everything.count(".check(") >= 1, "something to predict"
    assert sum("assert " in c.source for c in codes(source)) >= 3, "claims are measured"


@chapters
def test_a_result_comes_first(source):
    """The second cell of code shows something."""
    assert re.search(r"widgets\.(dashboard|show|explore|compare)\(", codes(source)[1].source)


@chapters
def test_links_lead_somewhere(source):
    for cell in texts(source):
        for link in re.findall(r"\]\(([^)\s]+)\)", cell.source):
            if link.startswith("https://"):
                continue
            target = (source.parent / link.partition("#")[0]).resolve()
            assert target.exists() and target.is_relative_to(ROOT), f"{source.name}: {link}"


@chapters
def test_a_chapter_does_not_copy_the_library(source):
    """Losses, methods, schedules and samplers are imported."""
    assert not re.search(r"\.backward\(\)\n\s+optimizer\.step", source.read_text("utf-8"))


def test_check_tells_a_foreign_notebook(tmp_path, monkeypatch, capsys):
    """A source that was changed after its notebook was made, cells changed by hand, and no notebook at all."""
    source = tmp_path / "77_a_test.py"
    source.write_text("# %%\nprint(6 * 7)\n")
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert build.main(["--check"]) == 1 and "there is no notebook" in capsys.readouterr().out
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    notebook = source.with_suffix(".ipynb")
    assert "42" in notebook.read_text()
    notebook.write_text(notebook.read_text().replace("6 * 7", "7 * 6"))
    assert build.main(["--check"]) == 1 and "its cells are not those of the source" in capsys.readouterr().out
    notebook.write_text(notebook.read_text().replace("7 * 6", "6 * 7").replace("42", "43"))
    source.write_text("# %% [markdown]\n# words\n\n# %%\nprint(6 * 7)\n")
    assert build.main([]) == 0  # words changed: nothing is run
    assert build.main(["--check"]) == 0 and "43" in notebook.read_text() and "words" in notebook.read_text()
    source.write_text("# %%\nprint(7 * 6)\n")
    assert build.main(["--check"]) == 1 and "made from another source" in capsys.readouterr().out


def test_a_cell_that_warns_is_no_output_to_commit(tmp_path, monkeypatch):
    source = tmp_path / "77_a_test.py"
    source.write_text('# %%\nimport warnings\n\nwarnings.warn("old")\n')
    monkeypatch.setattr(build, "HERE", tmp_path)
    with pytest.raises(ValueError, match="77_a_test.py: a cell warns"):
        build.main(["77"])


def test_an_unknown_chapter_is_named(capsys):
    assert build.main(["98"]) == 2
    assert "no chapter 98; there are" in capsys.readouterr().out
