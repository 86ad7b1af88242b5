"""Files that are whole or absent."""

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from distill.atomic import AGE, write_beside


def test_a_file_gets_the_mode_that_umask_gives(tmp_path):
    """safetensors makes its files readable by their owner alone."""
    old = os.umask(0o022)
    try:
        write_beside(tmp_path / "a.safetensors", lambda temporary: save_file({"a": torch.ones(2)}, temporary))
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"old")

    def fails(temporary):
        (temporary.parent / ".tmpXyZ").write_bytes(b"a writer's own temporary")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beside(file, fails)
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    left, fresh, other = (tmp_path / name for name in (".a.x1.tmp", ".a.x2.tmp", ".b.x3.tmp"))
    for room in (left, fresh, other):
        room.mkdir()
        (room / "half").write_bytes(b"half")
    for room in (left, other):
        os.utime(room, (time.time() - 2 * AGE,) * 2)
    write_beside(tmp_path / "a", lambda temporary: temporary.write_bytes(b"new"))
    assert not left.exists() and fresh.exists() and other.exists()
