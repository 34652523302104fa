"""The history: whole batches, each child once, read back as written; a damaged or foreign file is refused by name."""

import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from cqd_jax.store.history import Batch, History, HistoryError, Scored

NAMES = ["coding", 'data "base"', "os"]


def batch_of(number, size=4, seed=0):
  chance = np.random.default_rng((seed, number))
  first = 0 if number == 0 else 3 + size * (number - 1)
  size = 3 if number == 0 else size
  scores = chance.uniform(size=(size, 3))
  if number:
    scores[0, 1] = np.nan
  return Batch(
    number=number,
    identities=np.arange(first, first + size),
    archive=np.full(size, -1 if number == 0 else number % 3),
    parents=np.full((size, 2), -1) if number == 0 else chance.integers(0, first, (size, 2)),
    weights=[None] * size if number == 0 else list(chance.normal(size=(size, 2, 2)).astype(np.float32)),
    mutation=["" if number == 0 else "svd 2"] * size,
    scores=scores,
    taken=chance.uniform(size=(size, 3)) < 0.5,
    seconds=chance.uniform(),
    metrics={"coverage": chance.uniform(size=3).tolist(), "max_fitness": [0.5, float("-inf"), 1.0], "best_mean": 0.5},
  )


def fill(path, numbers):
  with History(path, NAMES) as history:
    for number in numbers:
      history.add(batch_of(number))


def test_individuals_and_metrics_come_back_as_they_were(tmp_path):
  fill(tmp_path / "h.sqlite", range(4))
  batches = [batch_of(number) for number in range(4)]
  with History(tmp_path / "h.sqlite") as history:
    assert history.task_names == NAMES
    assert history.num_batches == 4
    individuals, metrics = history.individuals(), history.metrics()
  assert len(individuals) == 3 + 3 * 4
  np.testing.assert_array_equal(individuals.born, [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4)
  for name in ("archive", "parents", "scores", "taken"):
    np.testing.assert_array_equal(getattr(individuals, name), np.concatenate([getattr(b, name) for b in batches]))
  for ours, theirs in zip(individuals.weights, [w for b in batches for w in b.weights], strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert individuals.mutation == [""] * 3 + ["svd 2"] * 12
  np.testing.assert_allclose(individuals.seconds[3:7], batches[1].seconds / 4)
  np.testing.assert_array_equal(metrics["coverage"], [b.metrics["coverage"] for b in batches[1:]])
  np.testing.assert_array_equal(metrics["max_fitness"], [[0.5, np.nan, 1.0]] * 3)
  np.testing.assert_array_equal(metrics["seconds"], [b.seconds for b in batches[1:]])


def test_it_answers_sql(tmp_path):
  fill(tmp_path / "h.sqlite", range(2))
  connection = sqlite3.connect(tmp_path / "h.sqlite")
  question = 'SELECT identity, score_os, "took_data ""base""" FROM individuals WHERE batch = 1'
  rows = connection.execute(question).fetchall()
  expected = batch_of(1)
  assert [row[0] for row in rows] == expected.identities.tolist()
  assert [row[1] for row in rows] == expected.scores[:, 2].tolist()
  assert [bool(row[2]) for row in rows] == expected.taken[:, 1].tolist()
  question = "SELECT json_extract(metrics, '$.coverage[0]') FROM batches WHERE batch = 1"
  (coverage,) = connection.execute(question).fetchone()
  assert coverage == expected.metrics["coverage"][0]
  connection.close()


def test_a_batch_made_again_is_written_once(tmp_path):
  fill(tmp_path / "h.sqlite", range(4))
  fill(tmp_path / "h.sqlite", [2, 3, 4])  # as after a checkpoint of batch 1
  with History(tmp_path / "h.sqlite", NAMES) as history:
    assert history.num_batches == 5
    assert len(history.individuals()) == 3 + 4 * 4
    with pytest.raises(ValueError, match="expected number 5 next, got 7"):
      history.add(batch_of(7))


def test_a_batch_that_comes_out_differently_replaces_what_followed(tmp_path):
  fill(tmp_path / "h.sqlite", range(4))
  with History(tmp_path / "h.sqlite", NAMES) as history:
    with pytest.warns(UserWarning, match="from batch 2 on it came out differently"):
      history.add(batch_of(2, seed=1))
    assert history.num_batches == 3
    individuals = history.individuals()
  np.testing.assert_array_equal(individuals.scores[7:], batch_of(2, seed=1).scores)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (5, 2, 8), (4, 3, 100)])
def test_evaluations_are_remembered_to_the_bit(tmp_path, shape):
  passed = np.random.default_rng(0).uniform(size=shape) < 0.5
  with History(tmp_path / "h.sqlite", NAMES) as history:
    assert history.recall("test", "ab") is None
    history.remember("test", "ab", Scored(passed, 1.5))
    history.remember("validation", "ab", Scored(~passed, 1.0))
  with History(tmp_path / "h.sqlite", NAMES) as history:
    np.testing.assert_array_equal(history.recall("test", "ab").passed, passed)
    np.testing.assert_array_equal(history.recall("validation", "ab").passed, ~passed)
    assert history.recall("test", "ab").seconds == 1.5


def test_the_initial_population_is_never_written_anew(tmp_path):
  fill(tmp_path / "h.sqlite", range(3))
  with History(tmp_path / "h.sqlite", NAMES) as history:
    with pytest.raises(HistoryError, match="began with other experts"):
      history.add(batch_of(0, seed=1))
    assert history.num_batches == 3


def test_another_program_that_holds_the_file_is_told_by_its_name(tmp_path, monkeypatch):
  monkeypatch.setattr("cqd_jax.store.history.BUSY_SECONDS", 0.1)
  fill(tmp_path / "h.sqlite", range(2))
  other = sqlite3.connect(tmp_path / "h.sqlite")
  with History(tmp_path / "h.sqlite", NAMES) as history:
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(HistoryError, match=r"h\.sqlite: could not be .*database is locked"):
      History(tmp_path / "h.sqlite", NAMES)
    other.rollback()
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(HistoryError, match=r"h\.sqlite: could not be written \(database is locked\)"):
      history.add(batch_of(2))
    other.rollback()
    history.add(batch_of(2))
  other.close()


def test_a_snapshot_is_of_one_moment(tmp_path):
  fill(tmp_path / "h.sqlite", range(3))
  with History(tmp_path / "h.sqlite") as reader, reader.snapshot():
    assert len(reader.individuals()) == 3 + 2 * 4
    assert len(reader.metrics()["seconds"]) == 2


def test_an_empty_history_has_no_one_and_no_figures(tmp_path):
  with History(tmp_path / "h.sqlite", NAMES) as history:
    individuals = history.individuals()
    assert len(individuals) == 0
    assert individuals.scores.shape == (0, 3)
    assert individuals.parents.shape == (0, 2)
    assert history.metrics() == {}


def test_a_missing_damaged_or_foreign_file_is_refused_by_name(tmp_path):
  with pytest.raises(HistoryError, match=r"none\.sqlite: no such history"):
    History(tmp_path / "none.sqlite")
  fill(tmp_path / "h.sqlite", range(30))
  with pytest.raises(HistoryError, match=r"is of the tasks \['coding'"):
    History(tmp_path / "h.sqlite", ["other"])
  whole = (tmp_path / "h.sqlite").read_bytes()
  for name, content in {
    "noise": b"no database" * 1000,
    "short": whole[: len(whole) // 2 + 100],
    "zeroed": whole[:8192] + b"\xff" * (len(whole) - 8192),
  }.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HistoryError, match=f"{name}: "):
      History(tmp_path / name, NAMES)
  other = sqlite3.connect(tmp_path / "other.sqlite")
  other.execute("CREATE TABLE t (x)")
  other.close()
  with pytest.raises(HistoryError, match="expected a history of format 1, got 0"):
    History(tmp_path / "other.sqlite", NAMES)


WRITER = """
import sys
sys.path.insert(0, {tests!r})
import pathlib
import test_history as cases
with cases.History(pathlib.Path({path!r}), cases.NAMES) as history:
  print("ready", flush=True)
  for number in range(history.num_batches, 100000):
    history.add(cases.batch_of(number))
"""


def test_a_process_killed_while_it_writes_leaves_whole_batches(tmp_path, pytestconfig):
  """Killed on a write that is seen under way (SQLite's journal is there) five times, and read after each."""
  path = tmp_path / "h.sqlite"
  program = WRITER.format(tests=str(pytestconfig.rootpath / "tests" / "io"), path=str(path))
  chance = np.random.default_rng(0)
  written = 0
  for _ in range(5):
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ})
    assert process.stdout.readline() == b"ready\n"
    time.sleep(chance.uniform(0, 0.3))
    deadline = time.monotonic() + 20
    while not path.with_name("h.sqlite-journal").exists() and time.monotonic() < deadline:
      pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with History(path, NAMES) as history:
      individuals = history.individuals()
      assert history.num_batches >= written
      written = history.num_batches
    np.testing.assert_array_equal(np.bincount(individuals.born), [3] + [4] * (written - 1))
  assert written > 5
