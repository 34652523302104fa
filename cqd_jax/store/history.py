"""The history of a run in one SQLite file: every individual of every method, the metrics of every batch, every score.

Ask it with any SQLite tool, also while the run goes on:

```sql
SELECT identity, batch, parent_1, parent_2, score_coding FROM individuals
WHERE method = 'CycleQD' AND took_coding ORDER BY score_coding DESC;
SELECT identity, json_extract(note, '$.angle') FROM individuals WHERE method = 'CycleQD';
SELECT batch, json_extract(metrics, '$.coverage') FROM batches WHERE method = 'CycleQD';
SELECT individual, seconds, turns, answer_tokens FROM evaluations WHERE split = 'validation';
```

A batch is written in one transaction, so a killed run leaves whole batches. A resumed run makes the batches after its
checkpoint again, with the same result; what is already there is then left as it is.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cqd_jax.archive.cells import Cells, cells_from_json, cells_to_json
from cqd_jax.store.costs import Cost, costs_of
from cqd_jax.store.evaluations import (
  INSERT,
  TABLE,
  Evaluation,
  answers_by_question,
  row_of,
  solved_by_somebody,
  values_by_name,
)
from cqd_jax.store.individuals import Individuals
from cqd_jax.store.transcripts import INSERT_TEXT, TEXTS, pack_transcripts, read_transcripts, text_rows
from cqd_jax.tasks.problem import Transcript

FORMAT = 5
BUSY_SECONDS = 10.0
"""For so long a writer waits for readers in silence; then it says who they are, and goes on waiting."""


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
    notes: for each what its method reports of it, by name, in JSON's types; "weights" are merge weights `[2, G]`.
    mutation: for each what was done after merging; "" for nothing.
    scores: `[P, K]`; NaN where scoring failed.
    individuals: for each the name under which its values are remembered: its skill vector.
    taken: `[P, K]` bool.
    seconds: that scoring the batch took.
    metrics: figures of the repertoire after it, by name: a number, or K of them.
  """

  number: int
  identities: np.ndarray
  archive: np.ndarray
  parents: np.ndarray
  notes: Sequence[Mapping[str, Any]]
  mutation: Sequence[str]
  scores: np.ndarray
  taken: np.ndarray
  seconds: float
  metrics: Mapping[str, Any]
  individuals: Sequence[str] = ()


class History:
  """The history in a file; use it as a context manager.

  Args:
    path: made if need be, when `task_names` are given.
    task_names: K names; None opens what is there, to read: nothing is written, and no writer is kept waiting, since
      what is read is a copy of this moment.

  Raises:
    HistoryError: naming the file, if it is missing, damaged, of another format, or of other tasks.
  """

  def __init__(self, path: Path, task_names: Sequence[str] | None = None):
    if task_names is None and not path.is_file():
      raise HistoryError(f"{path}: no such history")
    self._path = path
    try:
      self._connection = _open_to_read(path) if task_names is None else sqlite3.connect(path, timeout=BUSY_SECONDS)
      if task_names is not None:
        self._connection.execute("PRAGMA synchronous = FULL")
      if task_names is not None and not self._has_tables():
        self._create(task_names)
      self.task_names = self._check(task_names)
    except sqlite3.OperationalError as error:  # the disk, or another program
      raise HistoryError(f"{path}: could not be opened ({error})") from error
    except sqlite3.DatabaseError as error:
      raise HistoryError(
        f"{path}: damaged ({error}); moved elsewhere, resuming makes the run again from its experts"
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

  def methods(self) -> list[str]:
    """The names of the methods, in the order in which they began."""
    return [name for (name,) in self._connection.execute("SELECT name FROM methods ORDER BY number")]

  def describe(self, method: str, *, cells: Cells) -> None:
    """Keeps how the archives of a method are cut into cells."""
    text = json.dumps(cells_to_json(cells))

    def write() -> None:
      self._begin(method)
      self._connection.execute("UPDATE methods SET cells = ? WHERE name = ?", (text, method))

    self._write(write)

  def cells(self, method: str) -> Cells | None:
    """What `describe` kept; None if the method has no archives."""
    row = self._connection.execute("SELECT cells FROM methods WHERE name = ?", (method,)).fetchone()
    try:
      return None if row is None or row[0] is None else cells_from_json(json.loads(row[0]))
    except (ValueError, KeyError, TypeError) as error:
      raise HistoryError(f"{self._path}: damaged, the cells of {method!r} cannot be read ({error})") from error

  def num_batches(self, method: str) -> int:
    """How many batches of a method are written, the initial population included."""
    (count,) = self._connection.execute("SELECT count(*) FROM batches WHERE method = ?", (method,)).fetchone()
    return int(count)

  def add(self, method: str, batch: Batch) -> None:
    """Writes a batch of a method.

    One that is there already is left as it is, if it has the same individuals. Else (another version of some
    library rounds differently) it and all that follow are written again, with a warning.

    Raises:
      ValueError: if the batch before it is not there; naming a note that cannot be kept.
    """
    rows = self._rows(method, batch)
    there = self.num_batches(method)
    if batch.number < there:
      if self._deterministic(self._individual_rows(method, batch.number)) == self._deterministic(rows):
        return
      if batch.number == 0:
        raise HistoryError(f"{self._path}: {method!r} began with other experts, or other questions, than these")
      warnings.warn(
        f"{self._path}: {method!r} came out differently from batch {batch.number} on; written again", stacklevel=2
      )
    elif batch.number > there:
      raise ValueError(f"batch: expected number {there} next, got {batch.number}")
    marks = ", ".join("?" * len(rows[0]))
    figures = json.dumps(_plain(dict(batch.metrics), "metrics"))

    def write() -> None:
      self._begin(method)
      for table in ("individuals", "batches"):
        self._connection.execute(f"DELETE FROM {table} WHERE method = ? AND batch >= ?", (method, batch.number))
      self._connection.executemany(f"INSERT INTO individuals VALUES ({marks})", rows)
      self._connection.execute(
        "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)",
        (method, batch.number, figures, batch.seconds, time.time(), len(rows)),
      )

    self._write(write)

  def individuals(self, method: str) -> Individuals:
    """All individuals of a method, in the order of identity.

    Raises:
      HistoryError: naming the individual that is missing, or whose row cannot be what was written.
    """
    rows = self._individual_rows(method)
    self._check_rows(method, rows)
    num_tasks = len(self.task_names)
    columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) or [()] * (10 + 2 * num_tasks)
    _, _, batch, archive, first, second, notes, mutation, seconds = columns[:9]
    scores, taken = columns[9 : 9 + num_tasks], columns[9 + num_tasks : 9 + 2 * num_tasks]

    def pairs(one: Sequence[Any], other: Sequence[Any]) -> np.ndarray:
      return np.array([one, other], float).T.reshape(-1, 2)

    return Individuals(
      born=np.array(batch, int),
      archive=np.array([-1 if value is None else value for value in archive], int),
      parents=np.nan_to_num(pairs(first, second), nan=-1).astype(int),
      notes=[json.loads(text) for text in notes],
      mutation=[str(text) for text in mutation],
      scores=np.array(scores, float).T.reshape(-1, num_tasks),
      taken=np.array(taken, bool).T.reshape(-1, num_tasks),
      seconds=np.array(seconds, float),
    )

  def metrics(self, method: str) -> dict[str, np.ndarray]:
    """Figures after each batch, the batches on the leading axis from batch 1 on; and their "seconds"."""
    rows = self._connection.execute(
      "SELECT metrics, seconds FROM batches WHERE method = ? AND batch > 0 ORDER BY batch", (method,)
    ).fetchall()
    if not rows:
      return {}
    try:
      figures = [json.loads(text) for text, _ in rows]
      named = {name: np.array([entry[name] for entry in figures], float) for name in figures[0]}
    except (ValueError, TypeError, KeyError) as error:
      raise HistoryError(f"{self._path}: damaged, the figures of {method!r} cannot be read ({error})") from error
    return {**named, "seconds": np.array([seconds for _, seconds in rows])}

  def recall(self, split: str, problem: str, names: Sequence[str]) -> dict[str, tuple[np.ndarray, float]]:
    """Of those individuals that were scored: values `[K, B]` float32, and seconds that it took, by name.

    Args:
      split: whose questions.
      problem: its fingerprint; scores of another one are not recalled.
      names: of individuals, by their content.
    """
    return values_by_name(self._connection, split, problem, names)

  def remember(self, split: str, problem: str, evaluations: Mapping[str, Evaluation], seconds: float) -> None:
    """Writes how individuals were scored, so that they are never scored again.

    Args:
      split: whose questions.
      problem: its fingerprint.
      evaluations: by the name of the individual. Answers that are long are left out.
      seconds: that each took.
    """
    rows: list[tuple[Any, ...]] = []
    texts: dict[str, str] = {}
    for name, evaluation in evaluations.items():
      named, own = pack_transcripts(evaluation.transcripts)
      rows.append(row_of(split, problem, name, evaluation, seconds, named))
      texts |= own

    def write() -> None:
      self._connection.executemany(INSERT_TEXT, text_rows(texts.items()))
      self._connection.executemany(INSERT, rows)

    self._write(write)

  def transcripts(self, split: str, problem: str, name: str) -> list[Transcript]:
    """The dialogues that are kept of an individual, by its name; [] where there are none.

    Raises:
      HistoryError: if they are damaged.
    """
    try:
      return read_transcripts(self._connection, split, problem, name)
    except ValueError as error:
      raise HistoryError(f"{self._path}: damaged, {error}") from error

  def costs(self) -> list[Cost]:
    """What scoring took, by method; see `cqd_jax.store.costs`."""
    return costs_of(self._connection, self.methods())

  def verified(
    self, split: str, problem: str, names: Sequence[str] | None = None
  ) -> dict[tuple[int, int], dict[tuple[str, ...], str]]:
    """The distinct answers that passed, by task and sample, in the order in which they were first given.

    Args:
      split: whose questions.
      problem: its fingerprint.
      names: of the individuals that are listened to, in this order; None: all, in the order of scoring.

    Returns:
      By (task, sample): the turns of each answer, with the name of the individual that gave it first.
    """
    try:
      return answers_by_question(self._connection, split, problem, names)
    except ValueError as error:
      raise HistoryError(f"{self._path}: damaged, {error}") from error

  def num_solved(self, split: str) -> dict[str, tuple[int, int]]:
    """By task, how many questions somebody solved (a value of 1), of how many; of the problem scored last.

    {} where nobody was asked.
    """
    return dict(zip(self.task_names, solved_by_somebody(self._connection, split), strict=False))

  def skills(self, method: str, split: str, problem: str) -> list[np.ndarray | None]:
    """The values `[K, B]` of each individual of a method, in the order of identity; None where none are kept."""
    rows = self._connection.execute(
      "SELECT individual FROM individuals WHERE method = ? ORDER BY identity", (method,)
    ).fetchall()
    known = self.recall(split, problem, [name for (name,) in rows])
    return [known[name][0] if name in known else None for (name,) in rows]

  def _begin(self, method: str) -> None:
    self._connection.execute("INSERT OR IGNORE INTO methods (name) VALUES (?)", (method,))

  def _write(self, write: Callable[[], object]) -> None:
    """One transaction. While another program reads, it waits, and says for whom.

    Raises:
      HistoryError: what the file itself is not to blame for, with its name.
    """
    waiting = False
    while True:
      try:
        with self._connection:
          self._connection.execute("BEGIN IMMEDIATE")
          write()
        return
      except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
          raise HistoryError(f"{self._path}: could not be written ({error})") from error
      if not waiting:
        warnings.warn(
          f"{self._path}: {_readers(self._path)} holds it open; the run goes on as soon as that ends",
          stacklevel=2,
        )
      waiting = True

  def _has_tables(self) -> bool:
    return bool(self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])

  def _create(self, task_names: Sequence[str]) -> None:
    scores = "".join(f", {_quoted(f'score_{name}')} REAL" for name in task_names)
    taken = "".join(f", {_quoted(f'took_{name}')} INTEGER NOT NULL" for name in task_names)
    with self._connection:
      self._connection.execute("BEGIN")
      for statement in (
        "CREATE TABLE methods (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, cells TEXT)",
        "CREATE TABLE individuals (method TEXT NOT NULL, identity INTEGER NOT NULL, batch INTEGER NOT NULL, "
        "archive INTEGER, parent_1 INTEGER, parent_2 INTEGER, note TEXT NOT NULL, mutation TEXT NOT NULL, "
        f"seconds REAL NOT NULL{scores}{taken}, individual TEXT NOT NULL, PRIMARY KEY (method, identity))",
        "CREATE INDEX individuals_of_batch ON individuals (method, batch)",
        "CREATE TABLE batches (method TEXT NOT NULL, batch INTEGER NOT NULL, metrics TEXT NOT NULL, "
        "seconds REAL NOT NULL, written_at REAL NOT NULL, individuals INTEGER NOT NULL, PRIMARY KEY (method, batch))",
        TABLE,
        TEXTS,
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

  def _rows(self, method: str, batch: Batch) -> list[tuple[Any, ...]]:
    size = len(batch.identities)
    return [
      (
        method,
        int(batch.identities[p]),
        batch.number,
        _known(batch.archive[p]),
        *map(_known, batch.parents[p]),
        json.dumps({name: _plain(value, f"notes[{p}]: {name!r}") for name, value in batch.notes[p].items()}),
        batch.mutation[p],
        batch.seconds / size,
        *(float(score) if np.isfinite(score) else None for score in batch.scores[p]),
        *(int(took) for took in batch.taken[p]),
        batch.individuals[p] if batch.individuals else "",
      )
      for p in range(size)
    ]

  def _check_rows(self, method: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Raises unless rows are those of whole batches, each individual younger than its parents."""
    counts = self._connection.execute(
      "SELECT batch, individuals, metrics, seconds FROM batches WHERE method = ? ORDER BY batch", (method,)
    ).fetchall()
    expected = [number for number, count, *_ in counts if type(count) is int for _ in range(count)]
    where = f"{self._path}: damaged, {method!r}"
    if [number for number, *_ in counts] != list(range(len(counts))):
      raise HistoryError(f"{where}: a batch is missing")
    if [row[1] for row in rows] != list(range(len(expected))):
      there = {row[1] for row in rows}
      lost = next((one for one in range(len(expected)) if one not in there), len(expected))
      raise HistoryError(f"{where}: individual {lost} is missing, or one too many")
    num_tasks = len(self.task_names)
    for row, batch in zip(rows, expected, strict=True):
      if problem := _problem_of(row, batch, num_tasks):
        raise HistoryError(f"{where}: individual {row[1]}: {problem}")
    for number, _, metrics, seconds in counts:
      try:
        sound = isinstance(json.loads(metrics), dict) and isinstance(seconds, float)
      except (TypeError, ValueError):
        sound = False
      if not sound:
        raise HistoryError(f"{where}: the figures of batch {number} cannot be read")

  def _individual_rows(self, method: str, batch: int | None = None) -> list[tuple[Any, ...]]:
    where, arguments = ("AND batch = ?", (method, batch)) if batch is not None else ("", (method,))
    return self._connection.execute(
      f"SELECT * FROM individuals WHERE method = ? {where} ORDER BY identity", arguments
    ).fetchall()

  @staticmethod
  def _deterministic(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows without the seconds."""
    return [row[:8] + row[9:] for row in rows]


def _open_to_read(path: Path) -> sqlite3.Connection:
  """A copy in memory of what a file holds now; the file is only read.

  What a killed program left half written is undone in a copy on disk: that needs a writer.
  """
  copy = sqlite3.connect(":memory:")
  try:
    with contextlib.closing(_read_only(path)) as source:
      source.backup(copy)
    return copy
  except sqlite3.OperationalError:
    if not Path(f"{path}-journal").is_file():
      raise
  with tempfile.TemporaryDirectory(prefix="cqd-history-") as folder:
    own = Path(folder, path.name)
    for name in (path, Path(f"{path}-journal")):
      with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(name, own.with_name(name.name))
    with contextlib.closing(sqlite3.connect(own)) as source:
      source.backup(copy)
  return copy


def _read_only(path: Path) -> sqlite3.Connection:
  return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)


def _readers(path: Path) -> str:
  """The processes that hold locks on a file, as Linux lists them."""
  found = []
  try:
    inode = path.stat().st_ino
    for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
      words = line.split()
      if len(words) > 5 and words[5].endswith(f":{inode}") and int(words[4]) not in (os.getpid(), -1):
        name = Path("/proc", words[4], "comm").read_text(encoding="utf-8").strip()
        found.append(f"process {words[4]} ({name})")
  except (OSError, ValueError):
    pass
  return " and ".join(dict.fromkeys(found)) or "another program"


def _problem_of(row: tuple[Any, ...], batch: int, num_tasks: int) -> str:
  """What about the row of an individual cannot be; "" where all can."""
  _, identity, own_batch, archive, first, second, notes, mutation, seconds = row[:9]
  scores, taken = row[9 : 9 + num_tasks], row[9 + num_tasks : 9 + 2 * num_tasks]
  if own_batch != batch:
    return f"is of batch {own_batch}, expected {batch}"
  if archive is not None and (type(archive) is not int or not 0 <= archive < num_tasks):
    return f"archive {archive!r}"
  for parent in (first, second):
    if parent is not None and (type(parent) is not int or not 0 <= parent < identity):
      return f"has parent {parent!r}, which is no older individual"
  if not all(score is None or (type(score) is float and math.isfinite(score)) for score in scores):
    return f"has scores {scores}"
  if not all(took in (0, 1) for took in taken):
    return f"was taken {taken}"
  if type(mutation) is not str or type(seconds) is not float:
    return "its mutation or its seconds cannot be read"
  try:
    return "" if isinstance(json.loads(notes), dict) else "its note is no mapping"
  except (TypeError, ValueError):
    return "its note cannot be read"


def _quoted(name: str) -> str:
  return '"' + name.replace('"', '""') + '"'


def _known(value: Any) -> int | None:
  return int(value) if value >= 0 else None


def _plain(value: Any, name: str) -> Any:
  """A value as JSON has it. JSON has no infinities: what is not finite becomes null.

  Raises:
    ValueError: naming it, if it is no JSON.
  """
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  if isinstance(value, dict) and all(isinstance(key, str) for key in value):
    return {key: _plain(entry, name) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(entry, name) for entry in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, str | int):
    return value
  raise ValueError(f"{name}: expected numbers, text, and lists or names of these, got {type(value).__name__}")
