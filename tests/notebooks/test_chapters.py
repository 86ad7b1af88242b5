"""Every chapter runs from top to bottom at small settings; its asserts hold."""

import pytest
from chapters import SOURCES, build


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_a_chapter_runs(source):
    notebook = build.run(source, fast=True)
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")
