"""What ComfyUI's registry hands out: the archive that comfy-cli packs by .comfyignore."""

import zipfile

import pytest
from server import PACK


def test_the_archive_has_what_the_nodes_need_and_no_more(tmp_path, monkeypatch):
    file_utils = pytest.importorskip("comfy_cli.file_utils", reason="pip install comfy-cli")
    monkeypatch.chdir(PACK)
    file_utils.zip_files(str(tmp_path / "pack.zip"))
    with zipfile.ZipFile(tmp_path / "pack.zip") as archive:
        packed = set(archive.namelist())
    for part in ("web/docs/**/*.*", "subgraphs/*.json", "workflows/*.json", "locales/**/*.json", "nodes/**/*.py"):
        assert {p.relative_to(PACK).as_posix() for p in PACK.glob(part)} <= packed
    assert not {name.split("/")[0] for name in packed} & {"tests", "docs", "notebooks", "benchmarks", ".ci"}
