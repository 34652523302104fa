"""The history: whole batches, each child once, read back as written; a damaged or foreign file is refused by name."""

import contextlib
import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.archive import Centroids, Grid
from cqd_jax.store.costs import EXPERTS, LABELS, TEST, Cost
from cqd_jax.store.evaluations import Evaluation
from cqd_jax.store.history import Batch, History, HistoryError
from cqd_jax.tasks import Transcript, Usage

NAMES = ["coding", 'data "base"', "os"]
METHOD = "CycleQD"


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
    notes=[{} if number == 0 else {"weights": chance.normal(size=(2, 2)).tolist(), "angle": 0.5} for _ in range(size)],
    mutation=["" if number == 0 else "svd 2"] * size,
    scores=scores,
    taken=chance.uniform(size=(size, 3)) < 0.5,
    seconds=chance.uniform(),
    metrics={"coverage": chance.uniform(size=3).tolist(), "max_fitness": [0.5, float("-inf"), 1.0], "best_mean": 0.5},
  )


def fill(path, numbers, method=METHOD, seed=0):
  with History(path, NAMES) as history:
    for number in numbers:
      history.add(method, batch_of(number, seed=seed))


def test_individuals_and_metrics_come_back_as_they_were(tmp_path):
  fill(tmp_path / "h.sqlite", range(4))
  batches = [batch_of(number) for number in range(4)]
  with History(tmp_path / "h.sqlite") as history:
    assert history.task_names == NAMES
    assert history.methods() == [METHOD]
    assert history.num_batches(METHOD) == 4
    individuals, metrics = history.individuals(METHOD), history.metrics(METHOD)
  assert len(individuals) == 3 + 3 * 4
  np.testing.assert_array_equal(individuals.born, [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4)
  for name in ("archive", "parents", "scores", "taken"):
    np.testing.assert_array_equal(getattr(individuals, name), np.concatenate([getattr(b, name) for b in batches]))
  assert individuals.notes == [note for b in batches for note in b.notes]
  for identity, note in enumerate(individuals.notes):
    if identity < 3:
      assert individuals.weights(identity) is None
    else:
      np.testing.assert_array_equal(individuals.weights(identity), note["weights"])
  assert individuals.mutation == [""] * 3 + ["svd 2"] * 12
  np.testing.assert_allclose(individuals.seconds[3:7], batches[1].seconds / 4)
  np.testing.assert_array_equal(metrics["coverage"], [b.metrics["coverage"] for b in batches[1:]])
  np.testing.assert_array_equal(metrics["max_fitness"], [[0.5, np.nan, 1.0]] * 3)
  np.testing.assert_array_equal(metrics["seconds"], [b.seconds for b in batches[1:]])


def test_each_method_has_a_history_of_its_own(tmp_path):
  fill(tmp_path / "h.sqlite", range(3))
  fill(tmp_path / "h.sqlite", range(2), "CMA-ES, per kernel", seed=1)
  fill(tmp_path / "h.sqlite", [3])
  with History(tmp_path / "h.sqlite") as history:
    assert history.methods() == [METHOD, "CMA-ES, per kernel"]
    assert [history.num_batches(method) for method in (*history.methods(), "none")] == [4, 2, 0]
    first, second = (history.individuals(method) for method in history.methods())
    np.testing.assert_array_equal(first.scores, np.concatenate([batch_of(n).scores for n in range(4)]))
    np.testing.assert_array_equal(second.scores, np.concatenate([batch_of(n, seed=1).scores for n in range(2)]))
    assert len(history.metrics(METHOD)["seconds"]) == 3
    np.testing.assert_array_equal(
      history.metrics("CMA-ES, per kernel")["coverage"], [batch_of(1, seed=1).metrics["coverage"]]
    )


@pytest.mark.parametrize(
  ("note", "kept"),
  [
    ({"weights": [[1.0, -0.5], [0.0, 1.5]]}, None),
    ({"scale": 0.25, "flips": 3, "rule": "slerp", "found": True, "nothing": None}, None),
    ({"deep": {"a": [1, {"b": 2.5}]}}, None),
    ({"angle": float("nan"), "sizes": [1.0, float("inf")]}, {"angle": None, "sizes": [1.0, None]}),
  ],
)
def test_notes_are_whatever_json_holds(tmp_path, note, kept):
  batch = batch_of(0)
  batch.notes[1].update(note)
  with History(tmp_path / "h.sqlite", NAMES) as history:
    history.add(METHOD, batch)
    history.add(METHOD, batch)  # and are the same when they are made again
    assert history.individuals(METHOD).notes == [{}, note if kept is None else kept, {}]


@pytest.mark.parametrize("kind", ["grid", "centroids"])
def test_the_cells_of_a_method_are_kept(tmp_path, kind):
  points = np.random.default_rng(0).uniform(size=(3, 5, 2)).astype(np.float32)
  cells = Grid([0.1, 0, -1], [1, 1 / 3, 2], (2, 3, 4)) if kind == "grid" else Centroids(points=jnp.asarray(points))
  with History(tmp_path / "h.sqlite", NAMES) as history:
    assert history.cells(METHOD) is None
    history.describe(METHOD, cells=cells)
    history.add("without archives", batch_of(0))
  with History(tmp_path / "h.sqlite") as history:
    found = history.cells(METHOD)
    assert history.cells("without archives") is None
  if kind == "grid":
    assert found == cells
  else:
    np.testing.assert_array_equal(found.points, points)


def test_damaged_cells_are_told(tmp_path):
  fill(tmp_path / "h.sqlite", range(1))
  connection = sqlite3.connect(tmp_path / "h.sqlite")
  for text in ("{", "{}", '{"kind": "grid", "lower": [0], "upper": [1], "shape": [2]}', "3"):
    with connection:
      connection.execute("UPDATE methods SET cells = ?", (text,))
    with History(tmp_path / "h.sqlite") as history, pytest.raises(HistoryError, match=r"h\.sqlite: damaged, the cells"):
      history.cells(METHOD)
  connection.close()


def test_it_answers_sql(tmp_path):
  fill(tmp_path / "h.sqlite", range(2))
  connection = sqlite3.connect(tmp_path / "h.sqlite")
  question = 'SELECT identity, score_os, "took_data ""base""", note FROM individuals WHERE method = ? AND batch = 1'
  rows = connection.execute(question, (METHOD,)).fetchall()
  expected = batch_of(1)
  assert [row[0] for row in rows] == expected.identities.tolist()
  assert [row[1] for row in rows] == expected.scores[:, 2].tolist()
  assert [bool(row[2]) for row in rows] == expected.taken[:, 1].tolist()
  assert [json.loads(row[3]) for row in rows] == expected.notes
  for question, answer in (
    ("SELECT json_extract(metrics, '$.coverage[0]') FROM batches WHERE batch = 1", expected.metrics["coverage"][0]),
    (
      "SELECT json_extract(note, '$.weights[1][0]') FROM individuals WHERE identity = 4",
      expected.notes[1]["weights"][1][0],
    ),
    ("SELECT json_extract(note, '$.angle') FROM individuals WHERE identity = 4", 0.5),
  ):
    (found,) = connection.execute(question).fetchone()
    assert found == answer
  connection.close()


def test_notes_come_back_as_json(tmp_path):
  """Of arrays and numbers of any kind Python's own are kept; what JSON has no word for is null."""
  note = {
    "text": "svd \u2603 \ud800",
    "whole": np.int64(2**60),
    "flag": np.bool_(True),
    "half": np.float16(0.5),
    "list": [1, [2.5, None], ("a", np.arange(2))],
    "odd": [float("nan"), np.float32("inf"), 1.0],
    "by name": {"a": np.zeros((0, 2))},
  }
  with History(tmp_path / "h.sqlite", NAMES) as history:
    history.add(METHOD, dataclasses.replace(batch_of(0), notes=[note, {}, {"weights": [1.0, 2.0, 3.0]}]))
    individuals = history.individuals(METHOD)
  assert individuals.notes == [
    {
      "text": "svd \u2603 \ud800",
      "whole": 2**60,
      "flag": True,
      "half": 0.5,
      "list": [1, [2.5, None], ["a", [0, 1]]],
      "odd": [None, None, 1.0],
      "by name": {"a": []},
    },
    {},
    {"weights": [1.0, 2.0, 3.0]},
  ]
  assert individuals.weights(2) is None  # these are no two parents'


@pytest.mark.parametrize("value", [{1, 2}, b"a", object(), {1: 2}, [np.array([object()])], 1j], ids=range(6))
def test_a_note_that_is_no_json_is_refused_by_its_name(tmp_path, value):
  batch = dataclasses.replace(batch_of(0), notes=[{}, {"fine": 1, "bad one": value}, {}])
  with History(tmp_path / "h.sqlite", NAMES) as history:
    with pytest.raises(ValueError, match=r"notes\[1\]: 'bad one': expected numbers, text, and lists or names of these"):
      history.add(METHOD, batch)
    assert history.num_batches(METHOD) == 0


def test_a_batch_made_again_is_written_once(tmp_path):
  fill(tmp_path / "h.sqlite", range(4))
  fill(tmp_path / "h.sqlite", [2, 3, 4])  # as after a checkpoint of batch 1
  with History(tmp_path / "h.sqlite", NAMES) as history:
    assert history.num_batches(METHOD) == 5
    assert len(history.individuals(METHOD)) == 3 + 4 * 4
    with pytest.raises(ValueError, match="expected number 5 next, got 7"):
      history.add(METHOD, batch_of(7))
    with pytest.raises(ValueError, match="expected number 0 next, got 1"):
      history.add("another", batch_of(1))


def test_a_batch_that_comes_out_differently_replaces_what_followed(tmp_path):
  fill(tmp_path / "h.sqlite", range(4))
  fill(tmp_path / "h.sqlite", range(4), "another")
  with History(tmp_path / "h.sqlite", NAMES) as history:
    with pytest.warns(UserWarning, match="'CycleQD' came out differently from batch 2 on"):
      history.add(METHOD, batch_of(2, seed=1))
    assert history.num_batches(METHOD) == 3
    individuals = history.individuals(METHOD)
    assert history.num_batches("another") == 4
  np.testing.assert_array_equal(individuals.scores[7:], batch_of(2, seed=1).scores)


@pytest.mark.parametrize("changed", ["scores", "parents", "notes", "mutation", "taken", "archive"])
def test_everything_but_the_seconds_tells_whether_a_batch_is_the_same(tmp_path, changed):
  batch = batch_of(2)
  others = {
    "scores": batch.scores + 1e-12,
    "parents": batch.parents[::-1],
    "notes": [{**note, "angle": 0.25} for note in batch.notes],
    "mutation": ["svd 3"] * 4,
    "taken": ~batch.taken,
    "archive": batch.archive * 0 - 1,
  }
  fill(tmp_path / "h.sqlite", range(3))
  with History(tmp_path / "h.sqlite", NAMES) as history:
    history.add(METHOD, dataclasses.replace(batch, seconds=9.0, metrics={}))
    with pytest.warns(UserWarning, match="came out differently"):
      history.add(METHOD, dataclasses.replace(batch, **{changed: others[changed]}))


def test_the_initial_population_is_never_written_again(tmp_path):
  fill(tmp_path / "h.sqlite", range(3))
  with History(tmp_path / "h.sqlite", NAMES) as history:
    with pytest.raises(HistoryError, match="'CycleQD' began with other experts"):
      history.add(METHOD, batch_of(0, seed=1))
    assert history.num_batches(METHOD) == 3


def evaluated(values, answers=None):
  """Values and answers by name, as the history takes them."""
  return {name: Evaluation(own, (answers or {}).get(name, ())) for name, own in values.items()}


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 8), (3, 100)])
def test_evaluations_are_remembered_to_the_bit(tmp_path, shape):
  chance = np.random.default_rng(0)
  values = {name: chance.normal(size=shape).astype(np.float32) for name in ("a", "b", "c")}
  values["b"][0, -1] = np.nan
  values["c"][...] = np.nan
  with History(tmp_path / "h.sqlite", NAMES) as history:
    assert history.recall("test", "p=1", ["a"]) == {}
    history.remember("test", "p=1", evaluated(values), 1.5)
    history.remember("validation", "p=1", evaluated({"a": -values["a"]}), 1.0)
    history.remember("test", "p=2", evaluated({"a": values["a"] + 1}), 2.0)
    history.remember("test", "p=1", {}, 1.0)
  with History(tmp_path / "h.sqlite", NAMES) as history:
    known = history.recall("test", "p=1", ["c", "a", "nobody", "a", "b"])
    assert list(known) == ["c", "a", "b"]
    for name, (own, seconds) in known.items():
      assert own.dtype == np.float32
      np.testing.assert_array_equal(own.view(np.uint32), values[name].view(np.uint32))
      assert seconds == 1.5
    np.testing.assert_array_equal(history.recall("validation", "p=1", ["a"])["a"][0], -values["a"])
    np.testing.assert_array_equal(history.recall("test", "p=2", ["a", "b"])["a"][0], values["a"] + 1)
    assert "b" not in history.recall("test", "p=2", ["a", "b"])
    assert history.recall("test", "p=3", ["a"]) == {}
    assert history.recall("test", "p=1", []) == {}


def test_an_evaluation_made_again_is_the_last_one(tmp_path):
  with History(tmp_path / "h.sqlite", NAMES) as history:
    for number in (1, 2):
      history.remember("test", "p=1", evaluated({"a": np.full((3, 2), number, np.float32)}), float(number))
    own, seconds = history.recall("test", "p=1", ["a"])["a"]
  assert (own.tolist(), seconds) == ([[2, 2]] * 3, 2.0)


HOLDER = """
import sqlite3, sys
other = sqlite3.connect(sys.argv[1], isolation_level=None)
*_, cursor = [other.execute(each) for each in sys.argv[2].split(";")]
cursor.fetchone()
print("holds", flush=True)
sys.stdin.read()
"""
READS = {
  "a cursor not read to its end": "SELECT * FROM individuals",
  "a transaction that reads": "BEGIN; SELECT count(*) FROM batches",
  "a transaction that writes": "BEGIN IMMEDIATE",
}


@contextlib.contextmanager
def held(path, statement):
  """Another process holds the file, until told to end."""
  command = [sys.executable, "-c", HOLDER, str(path), statement]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "holds\n"
    yield process
    process.stdin.close()


@pytest.mark.parametrize("how", READS)
def test_a_run_waits_for_who_holds_the_file_and_says_who_it_is(tmp_path, monkeypatch, how):
  monkeypatch.setattr("cqd_jax.store.history.BUSY_SECONDS", 0.1)
  path = tmp_path / "h.sqlite"
  fill(path, range(200))
  with History(path, NAMES) as history, held(path, READS[how]) as process:
    threading.Timer(1.0, process.stdin.close).start()
    said = rf"h\.sqlite: process {process.pid} \(.*\) holds it open" if sys.platform == "linux" else "holds it open"
    with pytest.warns(UserWarning, match=said):
      history.add(METHOD, batch_of(200))
    history.remember("test", "p=1", evaluated({"a": np.zeros((3, 1), np.float32)}), 1.0)
  with History(path) as reader:
    assert reader.num_batches(METHOD) == 201


def test_who_cannot_open_it_in_time_says_why(tmp_path, monkeypatch):
  monkeypatch.setattr("cqd_jax.store.history.BUSY_SECONDS", 0.1)
  fill(tmp_path / "h.sqlite", range(2))
  with (
    held(tmp_path / "h.sqlite", "BEGIN EXCLUSIVE"),
    pytest.raises(HistoryError, match=r"h\.sqlite: could not be .*database is locked"),
  ):
    History(tmp_path / "h.sqlite", NAMES)


def test_a_reader_sees_one_moment_and_keeps_no_one_waiting(tmp_path, monkeypatch):
  monkeypatch.setattr("cqd_jax.store.history.BUSY_SECONDS", 0.1)
  fill(tmp_path / "h.sqlite", range(3))
  before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  with History(tmp_path / "h.sqlite") as reader:
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with History(tmp_path / "h.sqlite", NAMES) as history:
      history.add(METHOD, batch_of(3))
    assert len(reader.individuals(METHOD)) == 3 + 2 * 4
    assert len(reader.metrics(METHOD)["seconds"]) == 2


def test_what_a_killed_writer_left_is_read_without_changing_it(tmp_path):
  path = tmp_path / "h.sqlite"
  fill(path, range(60))
  program = (
    "import os, sqlite3, sys\n"
    "other = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
    "other.execute('PRAGMA cache_size = 1')\n"
    "other.execute('BEGIN IMMEDIATE')\n"
    "other.execute('UPDATE individuals SET mutation = mutation || hex(randomblob(5000))')\n"
    "os._exit(0)\n"
  )
  subprocess.run([sys.executable, "-c", program, str(path)], check=True)
  left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
  assert "h.sqlite-journal" in left
  with History(path) as reader:
    assert len(reader.individuals(METHOD)) == 3 + 59 * 4
  assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == left
  with History(path, NAMES) as history:  # a writer mends it
    assert len(history.individuals(METHOD)) == 3 + 59 * 4
  assert not path.with_name("h.sqlite-journal").exists()


DAMAGES = {
  "DELETE FROM individuals WHERE identity = 5": "individual 5 is missing",
  "DELETE FROM individuals WHERE identity = (SELECT max(identity) FROM individuals)": "individual 14 is missing",
  "DELETE FROM batches WHERE batch = 1": "a batch is missing",
  "UPDATE individuals SET parent_1 = 99 WHERE identity = 4": "individual 4: has parent 99, which is no older",
  "UPDATE individuals SET parent_2 = 4 WHERE identity = 4": "individual 4: has parent 4, which is no older",
  "UPDATE individuals SET parent_1 = 'x' WHERE identity = 4": "individual 4: has parent 'x'",
  "UPDATE individuals SET score_coding = 'high' WHERE identity = 6": "individual 6: has scores",
  "UPDATE individuals SET score_coding = 9e999 WHERE identity = 6": "individual 6: has scores",
  "UPDATE individuals SET took_coding = 7 WHERE identity = 6": "individual 6: was taken",
  "UPDATE individuals SET archive = 3 WHERE identity = 6": "individual 6: archive 3",
  "UPDATE individuals SET note = '[' WHERE identity = 6": "individual 6: its note cannot be read",
  "UPDATE individuals SET note = '1' WHERE identity = 6": "individual 6: its note is no mapping",
  "UPDATE individuals SET batch = 1 WHERE identity = 8": "individual 8: is of batch 1, expected 2",
  "UPDATE batches SET metrics = '{' WHERE batch = 2": "the figures of batch 2 cannot be read",
  "UPDATE batches SET individuals = 'x' WHERE batch = 2": "individual 11 is missing, or one too many",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_that_cannot_be_are_named(tmp_path, damage):
  fill(tmp_path / "h.sqlite", range(4))
  other = sqlite3.connect(tmp_path / "h.sqlite")
  other.execute(damage)
  other.commit()
  other.close()
  with History(tmp_path / "h.sqlite") as history, pytest.raises(HistoryError, match=rf"h\.sqlite: .*{DAMAGES[damage]}"):
    history.individuals(METHOD)


def test_an_empty_history_has_no_one_and_no_figures(tmp_path):
  with History(tmp_path / "h.sqlite", NAMES) as history:
    individuals = history.individuals(METHOD)
    assert len(individuals) == 0
    assert individuals.scores.shape == (0, 3)
    assert individuals.parents.shape == (0, 2)
    assert history.metrics(METHOD) == {}
    assert history.methods() == []


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
  for version in (0, 1, 2, 3, 4):
    path = tmp_path / f"other-{version}.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE t (x)")
    other.execute(f"PRAGMA user_version = {version}")
    other.close()
    with pytest.raises(HistoryError, match=f"expected a history of format 5, got {version}"):
      History(path, NAMES)


WRITER = """
import sys
import threading
sys.path.insert(0, {tests!r})
import pathlib
import numpy as np
import test_history as cases
with cases.History(pathlib.Path({path!r}), cases.NAMES) as history:
  print("ready", flush=True)
  for number in range(history.num_batches("second"), 100000):
    for method in (cases.METHOD, "second"):
      batch = cases.batch_of(number)
      values = {{f"{{method}} {{identity}}": np.full((3, 2), identity, np.float32) for identity in batch.identities}}
      history.remember("validation", "p=1", cases.evaluated(values), 1.0)
      history.add(method, batch)
"""


@pytest.mark.soak
def test_a_process_killed_while_it_writes_leaves_whole_batches(tmp_path):
  """Killed on a write that is seen under way (SQLite's journal is there) five times, and read after each."""
  path = tmp_path / "h.sqlite"
  program = WRITER.format(tests=str(Path(__file__).parent), path=str(path))
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
      for method in history.methods():
        individuals, num_batches = history.individuals(method), history.num_batches(method)
        np.testing.assert_array_equal(np.bincount(individuals.born), [3] + [4] * (num_batches - 1))
        # Scores are kept before the batch that tells of them.
        known = history.recall("validation", "p=1", [f"{method} {identity}" for identity in range(len(individuals))])
        assert [own[0, 0] for own, _ in known.values()] == list(range(len(individuals)))
      first, second = (history.num_batches(method) for method in (METHOD, "second"))
      assert first - second in (0, 1)
      assert second >= written
      written = second
  assert first + second > 5


def test_answers_that_passed_are_told_once_and_with_who_gave_them_first(tmp_path):
  zeros = np.zeros((3, 2), np.float32)
  given = {
    "a": [(0, 1, ("sum(x)",)), (2, 0, ("ls", "ls | wc -l"))],
    "b": [(0, 1, ("sum(x)",)), (0, 1, ("sum(y)",)), (0, 0, ("ü", ""))],
    "c": [(1, 0, ("x" * 20_001,))],
  }
  with History(tmp_path / "h.sqlite", NAMES) as history:
    history.remember("labels", "p=1", evaluated({"b": zeros}, given), 1.0)
    history.remember("labels", "p=1", evaluated({"a": zeros, "c": zeros, "d": zeros}, given), 1.0)
    history.remember("test", "p=1", evaluated({"a": zeros}, {"a": [(1, 1, ("other split",))]}), 1.0)
    first = {("sum(x)",): "b", ("sum(y)",): "b"}
    assert history.verified("labels", "p=1") == {
      (0, 1): first,
      (0, 0): {("ü", ""): "b"},
      (2, 0): {("ls", "ls | wc -l"): "a"},
    }
    assert history.verified("labels", "p=1", ["a", "nobody", "a"]) == {
      (0, 1): {("sum(x)",): "a"},
      (2, 0): {("ls", "ls | wc -l"): "a"},
    }
    assert history.verified("labels", "p=2") == {}
    history._connection.execute("UPDATE evaluations SET answers = x'00' WHERE individual = 'a' AND split = 'labels'")
    with pytest.raises(HistoryError, match=r"h\.sqlite: damaged, the answers"):
      history.verified("labels", "p=1")


def test_the_skill_vector_of_every_individual_is_at_hand(tmp_path):
  values = {name: np.full((3, 2), number, np.float32) for number, name in enumerate(("one", "two"))}
  with History(tmp_path / "h.sqlite", NAMES) as history:
    history.remember("validation", "p=1", evaluated(values), 1.0)
    batch = batch_of(0)
    names = ["two", "one", *["unknown"] * (len(batch.identities) - 2)]
    history.add(METHOD, dataclasses.replace(batch, individuals=names))
    known = history.skills(METHOD, "validation", "p=1")
  assert [None if own is None else own[0, 0] for own in known] == [1, 0, *[None] * (len(names) - 2)]


def test_how_many_questions_somebody_solved(tmp_path):
  nan = np.nan
  own = {"a": [[1, 0], [0.5, 0], [0, nan]], "b": [[1, 0], [0, 0], [1, nan]], "failed": [[nan] * 2] * 3}
  with History(tmp_path / "h.sqlite", NAMES) as history:
    assert history.num_solved("labels") == {}
    history.remember("labels", "p=0", evaluated({"a": np.ones((3, 2), np.float32)}), 1.0)
    history.remember("labels", "p=1", evaluated({name: np.array(rows, np.float32) for name, rows in own.items()}), 1.0)
    assert list(history.num_solved("labels").values()) == [(1, 2), (0, 2), (1, 1)]


def test_dialogues_are_kept_as_they_were_and_each_text_once(tmp_path):
  values, odd = np.zeros((3, 2), np.float32), "\ud800 </script> \x00 \u4e2d"
  said = [
    Transcript(0, 1, (("user", "prompt"), ("assistant", text), ("executed", "")), 0.25, odd) for text in ("a", odd)
  ]
  again = Transcript(2, 0, (("user", "prompt"), ("assistant", "a")), 1.0)
  with History(tmp_path / "h.sqlite", NAMES) as history:
    history.remember("test", "p=1", {"one": Evaluation(values, transcripts=said), "none": Evaluation(values)}, 1.0)
    history.remember("test", "p=1", {"two": Evaluation(values, transcripts=[again])}, 1.0)
  with History(tmp_path / "h.sqlite") as history:
    assert history.transcripts("test", "p=1", "one") == said
    assert history.transcripts("test", "p=1", "two") == [again]
    assert history.transcripts("test", "p=1", "none") == history.transcripts("validation", "p=1", "one") == []
    (texts,) = history._connection.execute("SELECT count(*) FROM texts").fetchone()
    assert texts == len({"prompt", "a", odd, ""})
    history._connection.execute("DELETE FROM texts")
    with pytest.raises(HistoryError, match=r"h\.sqlite: damaged, the dialogues"):
      history.transcripts("test", "p=1", "one")


def test_what_scoring_took_is_summed_by_method_and_split(tmp_path):
  values = np.array([[1, 0, np.nan], [0, 0, 0], [1, np.nan, np.nan]], np.float32)  # 6 samples
  names = [f"{number}" for number in range(7)]
  with History(tmp_path / "h.sqlite", NAMES) as history:
    assert history.costs() == []
    for number, name in enumerate(names):
      evaluation = Evaluation(values, usage=Usage(10 + number, 100, 10**number))
      history.remember("validation", "p=1", {name: evaluation}, 0.5)
    history.remember("validation", "p=0", {"3": Evaluation(values, usage=Usage(1, 1, 1))}, 9.0)
    history.remember("validation", "p=1", {"0": Evaluation(values, usage=Usage(10, 100, 1))}, 0.5)
    history.add(METHOD, dataclasses.replace(batch_of(0), individuals=names[:3]))
    history.add(METHOD, dataclasses.replace(batch_of(1), individuals=[*names[3:6], "3"]))
    history.add("other", dataclasses.replace(batch_of(0), individuals=names[:3]))
    history.add("other", dataclasses.replace(batch_of(1), individuals=["5", "6", "not scored", "nor this"]))
    history.add("idle", dataclasses.replace(batch_of(0), individuals=names[:3]))
    history.remember("test", "p=2", {"a": Evaluation(values)}, 0.25)
    history.remember("labels", "p=3", {"a": Evaluation(values, usage=Usage(7, 8, 9))}, 0.5)
    assert history.costs() == [
      Cost(EXPERTS, 3, 18, 1.5, 33, 300, 111),
      Cost(METHOD, 3, 18, 1.5, 42, 300, 111_000),
      Cost("other", 2, 12, 1.0, 31, 200, 1_100_000),
      Cost(LABELS, 1, 6, 0.5, 7, 8, 9),
      Cost(TEST, 1, 6, 0.25),
    ]
