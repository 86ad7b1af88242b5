"""Prompts from files of every kind: what is read, and what a bad line is told."""

import json
import sys
import types

import pytest

from distill.training.prompts import read_prompts

TWO = ["a red ring", "a blue square, left"]


def test_each_kind_of_file_gives_its_prompts(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes("\ufeffa red ring\r\n\n  a blue square, left \n".encode())
    (tmp_path / "a.jsonl").write_text('{"id": 1, "caption": "a red ring"}\n\n{"caption": "a blue square, left"}\n')
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, TWO)))
    (tmp_path / "a.csv").write_text('id,Text\n1,a red ring\n2,"a blue square, left"\n3,\n')
    for name, guessed in (("a.txt", None), ("a.jsonl", "caption"), ("b.jsonl", None), ("a.csv", "Text")):
        caplog.clear()
        assert read_prompts(tmp_path / name) == TWO
        assert (f"from the column {guessed!r}" in caplog.text) == (guessed is not None)
    assert read_prompts(tmp_path / "a.csv", "id") == ["1", "2", "3"]


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"url": ["x"] * 3, "caption": [*TWO, None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: line 3: None is no prompt"):
        read_prompts(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"words": TWO}), tmp_path / "a.parquet", row_group_size=1)
    assert read_prompts(tmp_path / "a.parquet") == TWO
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="a.parquet: not a sound parquet file"):
        read_prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.txt", "ring\nBlåbär", "a.txt: line 2: not UTF-8"),
        ("a.txt", "\n \n", "a.txt: no prompts in it"),
        ("a.jsonl", '"ring"\n{"prompt": ', "a.jsonl: line 2: not JSON"),
        ("a.jsonl", '"ring"\n\n7', "a.jsonl: line 3: 7 is no prompt"),
        ("a.jsonl", '{"prompt": "ring"}\n{"prompt": null}', "a.jsonl: line 2: None is no prompt"),
        ("a.jsonl", '{"prompt": "ring"}\n{"caption": "x"}', "a.jsonl: line 2: no column 'prompt'; there are caption"),
        ("a.jsonl", '{"a": "ring", "b": "x"}', "a.jsonl: which column holds the prompts[?] .*--column: a, b"),
        ("a.csv", "prompt,n\nring,1\nring, left,2\n", "a.csv: line 3: not the 2 fields"),
        ("a.csv", 'prompt,n\n"ring,1\n', "a.csv: line 2: unexpected end"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=says):
        read_prompts(tmp_path / name)


def test_a_folder_and_an_absent_file_are_told(tmp_path):
    with pytest.raises(ValueError, match="a folder, not a file of prompts"):
        read_prompts(tmp_path)
    for name in ("a.txt", "a.csv", "a.parquet", "org/a.txt"):
        with pytest.raises(FileNotFoundError, match=name):
            read_prompts(tmp_path / name if "/" not in name else name)


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_a_name_without_a_file_is_a_dataset(monkeypatch, kind):
    """The library itself is not needed for the tests: it gives rows with columns, or fails."""

    class Rows(list):
        features = {"image": types.SimpleNamespace(), "text": types.SimpleNamespace(dtype=kind)}

        def select_columns(self, names):
            return [{name: row[name] for name in names} for row in self]

    def load_dataset(name, split):
        if name == "some/gated":
            raise ConnectionError("no route to the hub\nand more lines")
        assert split == "train"
        return Rows({"image": 0, "text": text} for text in TWO)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("some/captions") == TWO
    with pytest.raises(ValueError, match="some/gated: neither .*: no route to the hub[.] Offline, save its prompts as"):
        read_prompts("some/gated")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="some/captions: no such file; .*pip install datasets"):
        read_prompts("some/captions")
