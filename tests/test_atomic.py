"""Files are whole or absent, readable by others, and what a killed process left is cleaned."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from distill.atomic import HERE, clean, replace, write_beside, write_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from distill.atomic import write_beside

def write(temporary):
    (temporary.parent / ".tmpOwn").write_bytes(b"half a file of a library's own")
    os.kill(os.getpid(), signal.SIGKILL)

write_beside(Path(sys.argv[1]), write)
"""

KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from distill.atomic import write_folder

def once(a, b, rename=os.replace):
    rename(a, b)
    os.kill(os.getpid(), signal.SIGKILL)

os.replace = once
write_folder(Path(sys.argv[1]), lambda new: (new / "net").write_text("new"))
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path):
    path = tmp_path / "a.safetensors"
    replace(path, b"old")
    run = subprocess.run([sys.executable, "-c", KILLED, path])
    assert run.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2 and path.read_bytes() == b"old"
    replace(tmp_path / "b", b"another file")
    assert names(tmp_path) == ["a.safetensors", "b"]


def test_nothing_of_others_is_cleaned(tmp_path):
    alive = (f".onestep-{os.getppid()}@{HERE}-alive_", ".onestep-4194305@elsewhere-another_machine_s")
    for name in (*alive, ".onestep-notes", ".tmpX", "onestep-1-x"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    clean(tmp_path)
    assert names(tmp_path) == before
    os.utime(tmp_path / alive[1], (0, 0))
    clean(tmp_path)
    assert names(tmp_path) == [name for name in before if name != alive[1]]


def test_a_save_inside_a_save_stays(tmp_path):
    def write(temporary):
        replace(tmp_path / "inner", b"1")
        temporary.write_bytes(b"2")

    write_beside(tmp_path / "outer", write)
    assert names(tmp_path) == ["inner", "outer"]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_the_umask_says_who_reads_it(tmp_path):
    old = os.umask(0o027)
    try:
        write_beside(tmp_path / "a", lambda temporary: save_file({"x": torch.ones(3)}, temporary))
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "write", [lambda p: p.write_bytes(bytes(9999)), lambda p: save_file({"x": torch.ones(9999)}, p)]
)
def test_a_full_disk_leaves_what_was_there_and_says_so_in_one_line(tmp_path, write):
    path = tmp_path / "a"
    replace(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the nearest to a full disk that a test may make
    try:
        with pytest.raises(OSError, match=r"/a: cannot be written: .*arge.* unchanged; make room") as e:
            write_beside(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value) and path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_what_is_no_matter_of_the_disk_keeps_its_own_error(tmp_path):
    with pytest.raises(ValueError, match="Key `x`"):
        write_beside(tmp_path / "a", lambda temporary: save_file({"x": 1}, temporary))
    assert names(tmp_path) == []


def test_a_folder_whose_place_was_cleared_by_a_killed_process_takes_it(tmp_path):
    path = tmp_path / "student"
    write_folder(path, lambda new: (new / "net").write_text("old"))
    run = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, path])
    assert run.returncode == -signal.SIGKILL and not path.exists()
    clean(tmp_path)
    assert names(tmp_path) == ["student"] and (path / "net").read_text() == "new"
