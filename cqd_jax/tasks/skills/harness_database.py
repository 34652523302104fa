"""Executes a SQL query on databases in memory. Sent to the sandbox as text: only the standard library."""

import sqlite3
from typing import Any

MAX_ROWS = 40
MAX_BYTES = 1000
MAX_INSTRUCTIONS = 100_000

ALLOWED = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE))

DATABASES: list[sqlite3.Connection] = []


def prepare(setup: list[str]) -> None:
  """Builds a database from each script; a job inherits its own copy of them, for they are only in memory."""
  DATABASES[:] = map(_open, setup)


def run(answer: str) -> list[Any]:
  """The first `MAX_ROWS` rows that the query gives on each database, or {"raises": what SQLite said}."""
  return [_query(database, answer) for database in DATABASES]


def _open(script: str) -> sqlite3.Connection:
  database = sqlite3.connect(":memory:", check_same_thread=False)
  database.executescript(script)
  database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
  database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
  # only reading is allowed, and only so many steps of SQLite's machine: a query may loop for ever
  database.set_authorizer(_authorize)
  database.set_progress_handler(lambda: 1, MAX_INSTRUCTIONS)
  return database


def _authorize(action: int, *_: Any) -> int:
  return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY


def _query(database: sqlite3.Connection, query: str) -> Any:
  try:
    rows = database.execute(query).fetchmany(MAX_ROWS)
  except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
    return {"raises": str(error)[:200]}
  return [[cell if type(cell) is not bytes else {"bytes": cell.hex()} for cell in row] for row in rows]
