"""Every file of a run is read through one door: what is damaged is named, and nothing good is lost to it."""

import json
import re
import shutil
import sqlite3

import jax
import pytest
from loop_cases import Plain
from rich.console import Console
from script_cases import QUIET, call

from cqd_jax.cli.main import main
from cqd_jax.run.check import check
from cqd_jax.store.run_dir import RunDirError

pytestmark = pytest.mark.usefixtures("qdax_ranks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  run_dir = tmp_path_factory.mktemp("check") / "run"
  with jax.numpy_rank_promotion("allow"):
    call(run_dir, Plain(), methods=["cycleqd"])
  return run_dir


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(name, change):
  """Damage: what a function of a JSON file's content leaves."""

  def damage(run_dir):
    path = run_dir / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

  return damage


def asked(statement):
  def damage(run_dir):
    connection = sqlite3.connect(run_dir / "history.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()

  return damage


def flipped(pattern):
  """A bit of the largest file that matches, in its last quarter."""

  def damage(run_dir):
    path = max(run_dir.glob(pattern), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)

  return damage


# by name: damage, what is said by `cqd check`, whether `cqd report` meets it
DAMAGES = {
  "facts: a missing field": (changed("run.json", lambda c: c.pop("created")), "run.json: damaged, 'created'", True),
  "facts: no session": (changed("run.json", lambda c: c["sessions"].clear()), "run.json: damaged, 'sessions'", True),
  "facts: a wrong type deep inside": (
    changed("run.json", lambda c: c["sessions"][0].update(devices="cpu")),
    r"run.json: damaged, 'sessions\.0\.devices': .* got 'cpu'",
    True,
  ),
  "facts: seconds below zero": (
    changed("run.json", lambda c: c["seconds"].update(evolve=-1.0)), r"damaged, 'seconds\.evolve'", True
  ),
  "facts: true for a number": (
    changed("run.json", lambda c: c["record"].update(planned=True)), r"damaged, 'record\.planned'", True
  ),
  "scores: a text for a number": (
    changed("scores.json", lambda c: c["test"][0].update(mean="high")),
    r"scores.json: damaged, 'test\.0\.mean': .*; delete it and make it again with: cqd resume",
    True,
  ),
  "scores: somebody who never was": (
    changed("scores.json", lambda c: c.update(best=10**6)), "scores.json: damaged, 'best' names an individual", True
  ),
  "scores: samples that are none": (
    changed("scores.json", lambda c: c.update(samples=[3])), r"scores.json: damaged, 'samples\.0'", True
  ),
  "history: a row is gone": (
    asked("DELETE FROM individuals WHERE identity = 3"), "history.sqlite: .*individual 3 is missing", True
  ),
  "history: a cycle": (
    asked("UPDATE individuals SET parent_1 = identity WHERE identity = 5"), "history.sqlite: .*individual 5", True
  ),
  "a model": (flipped("models/best/*.safetensors"), "params.safetensors: changed since it was written", False),
  "a checkpoint": (flipped("checkpoints/cycleqd/*/default/**/d/*"), "checkpoints/cycleqd/.*: .*damaged", False),
}  # fmt: skip


def test_a_whole_run_is_sound_and_stays_as_it_is(copy):
  before = contents(copy)
  assert main(["check", str(copy)]) == 0
  assert contents(copy) == before


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves unread
@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_named_and_nothing_is_written(copy, capsys, name):
  damage, message, met_by_report = DAMAGES[name]
  damage(copy)
  before = contents(copy)
  console = Console(width=2000, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
  with pytest.raises(RunDirError, match="damaged") as caught:
    check(copy, console)
  console.file.close()
  said = f"{caught.value}\n{console.export_text()}"
  assert re.search(message, said), said
  code = main(["report", str(copy)])
  error = capsys.readouterr().err
  assert code == (2 if met_by_report else 0), error
  assert error.count("\n") == met_by_report
  assert "unexpected" not in error
  after = contents(copy)
  if met_by_report:
    assert after == before


def test_without_a_history_nothing_is_made_in_its_place(copy, capsys):
  (copy / "history.sqlite").unlink()
  before = contents(copy)
  for command in ("report", "plot", "check"):
    assert main([command, str(copy)]) == 2
    assert "history.sqlite" in capsys.readouterr().err
  assert contents(copy) == before


def test_what_has_no_checksums_is_said(copy):
  for path in copy.glob("models/*/checksums.json"):
    path.unlink()
  console = Console(width=200, record=True, file=QUIET.file)
  check(copy, console)
  assert "no checksum was kept" in console.export_text()
