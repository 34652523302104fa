"""The history of a run in one SQLite file: every individual ever scored, the metrics of every batch, every evaluation.

Ask it with any SQLite tool, also while the run goes on:

```sql
SELECT identity, batch, parent_1, parent_2, score_coding FROM individuals WHERE took_coding ORDER BY score_coding DESC;
SELECT batch, json_extract(metrics, '$.coverage') FROM batches;
```

A batch is written in one transaction, so a killed run leaves whole batches. A resumed run makes the batches after its
checkpoint again, with the same result; what is already there is then left as it is.
"""

import contextlib
import dataclasses
import json
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cqd_jax.store.individuals import Individuals

FORMAT = 1
BUSY_SECONDS = 60.0


class HistoryError(ValueError):
  """A history that cannot be used; the message names its file."""


@dataclasses.dataclass(frozen=True)
class Batch:
  """What one batch of P individuals gave; batch 0 is the initial population.

  Attributes:
    number: of the batch.
    identities: `[P]` int.
    archive: `[P]` int, where the parents come from; -1: none.
    parents: `[P, 2]` int identities; -1: none.
    weights: for each the merge weights `[2, G]`; None without parents.
    mutation: for each what was done after merging; "" for nothing.
    scores: `[P, K]`; NaN where scoring failed.
    taken: `[P, K]` bool.
    seconds: that scoring the batch took.
    metrics: figures of the repertoire after it, by name: a number, or K of them.
  """

  number: int
  identities: np.ndarray
  archive: np.ndarray
  parents: np.ndarray
  weights: Sequence[np.ndarray | None]
  mutation: Sequence[str]
  scores: np.ndarray
  taken: np.ndarray
  seconds: float
  metrics: Mapping[str, Any]


class Scored(NamedTuple):
  """How P models were scored on B questions of each of K tasks.

  Attributes:
    passed: `[P, K, B]` bool, which questions each answers right.
    seconds: that it took.
  """

  passed: np.ndarray
  seconds: float


class History:
  """The history in a file; use it as a context manager.

  Args:
    path: made if need be, when `task_names` are given.
    task_names: K names; None opens what is there, to read.

  Raises:
    HistoryError: naming the file, if it is missing, damaged, of another format, or of other tasks.
  """

  def __init__(self, path: Path, task_names: Sequence[str] | None = None):
    if task_names is None and not path.is_file():
      raise HistoryError(f"{path}: no such history")
    self._path = path
    try:
      self._connection = sqlite3.connect(path, timeout=BUSY_SECONDS)
      self._connection.execute("PRAGMA synchronous = FULL")
      if task_names is not None and not self._has_tables():
        self._create(task_names)
      self.task_names = self._check(task_names)
    except sqlite3.OperationalError as error:  # the disk, or another program
      raise HistoryError(f"{path}: could not be opened ({error})") from error
    except sqlite3.DatabaseError as error:
      raise HistoryError(
        f"{path}: damaged ({error}); moved elsewhere, the run is made anew from its experts by resuming"
      ) from error

  def __enter__(self) -> "History":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file."""
    self._connection.close()

  @property
  def num_batches(self) -> int:
    """How many batches are written, the initial population included."""
    (count,) = self._connection.execute("SELECT count(*) FROM batches").fetchone()
    return int(count)

  def add(self, batch: Batch) -> None:
    """Writes a batch.

    One that is there already is left as it is, if it tells of the same individuals. Else (another version of some
    library rounds differently) it and all that follow are written anew, with a warning.

    Raises:
      ValueError: if the batch before it is not there.
    """
    rows = self._rows(batch)
    if batch.number < self.num_batches:
      if self._deterministic(self._individual_rows(batch.number)) == self._deterministic(rows):
        return
      if batch.number == 0:
        raise HistoryError(f"{self._path}: began with other experts, or other questions, than these")
      warnings.warn(f"{self._path}: from batch {batch.number} on it came out differently; written anew", stacklevel=2)
    elif batch.number > self.num_batches:
      raise ValueError(f"batch: expected number {self.num_batches} next, got {batch.number}")
    marks = ", ".join("?" * len(rows[0]))
    with self._writing():
      for table in ("individuals", "batches"):
        self._connection.execute(f"DELETE FROM {table} WHERE batch >= ?", (batch.number,))
      self._connection.executemany(f"INSERT INTO individuals VALUES ({marks})", rows)
      self._connection.execute(
        "INSERT INTO batches VALUES (?, ?, ?, ?)",
        (batch.number, json.dumps(_finite(dict(batch.metrics))), batch.seconds, time.time()),
      )

  @contextlib.contextmanager
  def snapshot(self) -> Iterator[None]:
    """What is read in the block is of one moment, though another process writes."""
    self._connection.execute("BEGIN")
    try:
      yield
    finally:
      self._connection.rollback()

  def individuals(self) -> Individuals:
    """All individuals, in the order of identity."""
    rows = self._individual_rows()
    num_tasks = len(self.task_names)
    columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) or [()] * (8 + 2 * num_tasks)
    _, batch, archive, first, second, weights, mutation, seconds = columns[:8]
    scores, taken = columns[8 : 8 + num_tasks], columns[8 + num_tasks :]

    def pairs(one: Sequence[Any], other: Sequence[Any]) -> np.ndarray:
      return np.array([one, other], float).T.reshape(-1, 2)

    return Individuals(
      born=np.array(batch, int),
      archive=np.array([-1 if value is None else value for value in archive], int),
      parents=np.nan_to_num(pairs(first, second), nan=-1).astype(int),
      weights=[None if text is None else np.array(json.loads(text)) for text in weights],
      mutation=[str(text) for text in mutation],
      scores=np.array(scores, float).T.reshape(-1, num_tasks),
      taken=np.array(taken, bool).T.reshape(-1, num_tasks),
      seconds=np.array(seconds, float),
    )

  def metrics(self) -> dict[str, np.ndarray]:
    """Figures after each batch, the batches on the leading axis from batch 1 on; and their "seconds"."""
    rows = self._connection.execute("SELECT metrics, seconds FROM batches WHERE batch > 0 ORDER BY batch").fetchall()
    if not rows:
      return {}
    figures = [json.loads(text) for text, _ in rows]
    named = {name: np.array([entry[name] for entry in figures], float) for name in figures[0]}
    return {**named, "seconds": np.array([seconds for _, seconds in rows])}

  def recall(self, split: str, models: str) -> Scored | None:
    """What `remember` was told of models on a split, if it was; `models` names them by content."""
    row = self._connection.execute(
      "SELECT passed, shape, seconds FROM evaluations WHERE split = ? AND models = ?", (split, models)
    ).fetchone()
    if row is None:
      return None
    bits, shape, seconds = np.frombuffer(row[0], np.uint8), json.loads(row[1]), row[2]
    return Scored(np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape), seconds)

  def remember(self, split: str, models: str, scored: Scored) -> None:
    """Writes how models were scored, so that they need never be asked again."""
    passed = scored.passed
    with self._writing():
      self._connection.execute(
        "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?)",
        (split, models, np.packbits(passed).tobytes(), json.dumps(passed.shape), scored.seconds),
      )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """One transaction; what the file itself is not to blame for is told with its name."""
    try:
      with self._connection:
        yield
    except sqlite3.OperationalError as error:
      raise HistoryError(f"{self._path}: could not be written ({error})") from error

  def _has_tables(self) -> bool:
    return bool(self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])

  def _create(self, task_names: Sequence[str]) -> None:
    scores = "".join(f", {_quoted(f'score_{name}')} REAL" for name in task_names)
    taken = "".join(f", {_quoted(f'took_{name}')} INTEGER NOT NULL" for name in task_names)
    with self._connection:
      self._connection.execute("BEGIN")
      for statement in (
        "CREATE TABLE individuals (identity INTEGER PRIMARY KEY, batch INTEGER NOT NULL, archive INTEGER, "
        "parent_1 INTEGER, parent_2 INTEGER, merge_weights TEXT, mutation TEXT NOT NULL, seconds REAL NOT NULL"
        f"{scores}{taken})",
        "CREATE INDEX individuals_of_batch ON individuals (batch)",
        "CREATE TABLE batches (batch INTEGER PRIMARY KEY, metrics TEXT NOT NULL, seconds REAL NOT NULL, "
        "written_at REAL NOT NULL)",
        "CREATE TABLE evaluations (split TEXT NOT NULL, models TEXT NOT NULL, passed BLOB NOT NULL, "
        "shape TEXT NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (split, models))",
        "CREATE TABLE tasks (number INTEGER PRIMARY KEY, name TEXT NOT NULL)",
      ):
        self._connection.execute(statement)
      self._connection.executemany("INSERT INTO tasks VALUES (?, ?)", enumerate(task_names))
      self._connection.execute(f"PRAGMA user_version = {FORMAT}")

  def _check(self, task_names: Sequence[str] | None) -> list[str]:
    (version,) = self._connection.execute("PRAGMA user_version").fetchone()
    if version != FORMAT:
      raise HistoryError(f"{self._path}: expected a history of format {FORMAT}, got {version}")
    (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
      raise sqlite3.DatabaseError(verdict)
    found = [name for (name,) in self._connection.execute("SELECT name FROM tasks ORDER BY number")]
    if task_names is not None and found != list(task_names):
      raise HistoryError(f"{self._path}: is of the tasks {found}, not of {list(task_names)}")
    return found

  def _rows(self, batch: Batch) -> list[tuple[Any, ...]]:
    size = len(batch.identities)
    return [
      (
        int(batch.identities[p]),
        batch.number,
        _known(batch.archive[p]),
        *map(_known, batch.parents[p]),
        None if (weights := batch.weights[p]) is None else json.dumps(np.asarray(weights, float).tolist()),
        batch.mutation[p],
        batch.seconds / size,
        *(float(score) if np.isfinite(score) else None for score in batch.scores[p]),
        *(int(took) for took in batch.taken[p]),
      )
      for p in range(size)
    ]

  def _individual_rows(self, batch: int | None = None) -> list[tuple[Any, ...]]:
    where, arguments = ("WHERE batch = ?", (batch,)) if batch is not None else ("", ())
    return self._connection.execute(f"SELECT * FROM individuals {where} ORDER BY identity", arguments).fetchall()

  @staticmethod
  def _deterministic(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows without the seconds."""
    return [row[:7] + row[8:] for row in rows]


def _quoted(name: str) -> str:
  return '"' + name.replace('"', '""') + '"'


def _known(value: Any) -> int | None:
  return int(value) if value >= 0 else None


def _finite(value: Any) -> Any:
  """JSON has no infinities: what is not finite becomes null."""
  if isinstance(value, dict):
    return {name: _finite(entry) for name, entry in value.items()}
  if isinstance(value, list):
    return [_finite(entry) for entry in value]
  return value if np.isfinite(value) else None
