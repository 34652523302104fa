"""A run directory: held by one process, its files written whole, a full disk recognized; and a model folder."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from cqd_jax.store.run_dir import RunDirError, is_disk_full, locked, read_json, write_json, write_text

HOLDER = """
import pathlib, sys, time
from cqd_jax.store.run_dir import locked
with locked(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_directory_in_use_is_refused_and_free_once_its_holder_is_killed(tmp_path):
  holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
  try:
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RunDirError, match=f"in use by process {holder.pid}"), locked(tmp_path):
      pass
  finally:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
  with locked(tmp_path), pytest.raises(RunDirError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
    pass
  with locked(tmp_path):
    pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  write_json(path, {"n": 1})

  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    write_json(path, {"n": 2})
  assert read_json(path) == {"n": 1}
  assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_json_that_is_missing_or_broken_is_named(tmp_path):
  with pytest.raises(RunDirError, match=r"a\.json: no such file"):
    read_json(tmp_path / "a.json")
  write_text(tmp_path / "a.json", '{"n": ')
  with pytest.raises(RunDirError, match=r"a\.json: not JSON"):
    read_json(tmp_path / "a.json")


def test_a_full_disk_is_recognized_through_what_it_caused():
  assert is_disk_full(OSError(errno.ENOSPC, "x"))
  assert is_disk_full(ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']"))
  assert is_disk_full(RuntimeError("database or disk is full"))
  outer = ValueError("could not write")
  outer.__cause__ = OSError(errno.ENOSPC, "x")
  assert is_disk_full(outer)
  assert not is_disk_full(ValueError("too full a sentence"))
  assert not is_disk_full(None)


def test_what_killed_processes_left_half_written_is_swept_away(tmp_path):
  (tmp_path / "models" / ".elite-000001.123").mkdir(parents=True)
  (tmp_path / "models" / "elite-000001").mkdir()
  (tmp_path / ".scores.json.99").write_text("{")
  (tmp_path / ".gitignore").write_text("mine")
  with locked(tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", ".lock", "models"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["elite-000001"]
