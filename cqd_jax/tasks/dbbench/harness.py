"""Executes a dialogue's statements on a database in memory. Sent to the sandbox as text: only the standard library."""

import hashlib
import re
import sqlite3
from typing import Any

from cqd_jax.tasks.dbbench.dialect import Refused, Token, parse, translate
from cqd_jax.tasks.dbbench.functions import install, text

SHOWN_CHARACTERS = 1000
MAX_ROWS = 5000
MAX_BYTES = 1 << 20
MAX_PAGES = 8192
STATEMENT_INSTRUCTIONS = 1_000_000
TOTAL_INSTRUCTIONS = 2_000_000
INSTRUCTIONS_AT_A_TIME = 1000

ALLOWED = frozenset(
  (
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_DELETE,
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_ALTER_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_DROP_INDEX,
    sqlite3.SQLITE_REINDEX,
  )
)
IGNORED = frozenset(("USE", "SET", "START", "BEGIN", "COMMIT", "ROLLBACK", "LOCK", "UNLOCK"))
"""First words of statements that change nothing in a session of one statement."""

ERRORS = (
  (r"no such column: (.*)", "1054: Unknown column '{}'"),
  (r"no such table: (.*)", "1146: Table '{}' doesn't exist"),
  (r'near "(.*)": syntax error', "1064: You have an error in your SQL syntax near '{}'"),
  (r"no such function: (.*)", "1305: FUNCTION {} does not exist"),
  (r"not authorized.*", "1227: Access denied"),
)


class Budget:
  """How many steps of SQLite's machine the statements may take: a query may loop for ever."""

  def __init__(self) -> None:
    self.left, self.total = 0, TOTAL_INSTRUCTIONS

  def begin(self) -> None:
    """The next statement begins."""
    self.left = min(STATEMENT_INSTRUCTIONS, self.total)

  def spend(self) -> int:
    """Some steps were taken; 1 ends the statement."""
    self.left -= INSTRUCTIONS_AT_A_TIME
    self.total -= INSTRUCTIONS_AT_A_TIME
    return int(self.left < 0)


def run(payload: Any) -> dict[str, Any]:
  """What the last of the statements gave, as text, and the table's hash where it is asked for."""
  database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
  try:
    install(database)
    _fill(database, payload["table"], payload["columns"], payload["rows"])
    budget = Budget()
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.execute(f"PRAGMA max_page_count = {MAX_PAGES}")
    database.set_authorizer(_authorize)
    database.set_progress_handler(budget.spend, INSTRUCTIONS_AT_A_TIME)
    observation = ""
    for statement in payload["statements"]:
      budget.begin()
      observation = _observe(database, statement, payload["table"], budget)
    database.set_progress_handler(None, 0)
    database.set_authorizer(None)
    hashed = _hash(database, payload["table"], payload["columns"]) if payload["hash"] else None
    return {"observation": observation, "hash": hashed}
  finally:
    database.close()


def _fill(database: sqlite3.Connection, table: str, columns: list[str], rows: list[list[str | None]]) -> None:
  declared = ", ".join(f"{_name(column)} TEXT COLLATE mysql" for column in columns)
  database.execute(f"CREATE TABLE {_name(table)} ({declared})")
  places = ", ".join("?" * len(columns))
  database.executemany(f"INSERT INTO {_name(table)} VALUES ({places})", rows)


def _observe(database: sqlite3.Connection, statement: str, table: str, budget: Budget) -> str:
  """What MySQL's client would print: a list of rows, or the error."""
  try:
    words = [each.value for each in parse(statement) if isinstance(each, Token)]
    first = words[0].upper() if words else ""
    if first in IGNORED:
      return "[]"
    if first in ("SHOW", "DESCRIBE", "DESC", "EXPLAIN"):
      return _listed(_describe(database, words))
    return _listed(database.execute(translate(statement, table)))
  except Refused as error:
    return str(error)
  except sqlite3.OperationalError as error:
    ended = budget.left < 0
    return "1317: Query execution was interrupted: it took too many steps" if ended else _error(error)
  except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError, RecursionError) as error:
    return _error(error)


def _error(error: BaseException) -> str:
  """In MySQL's words where SQLite's say the same."""
  said = str(error)[:SHOWN_CHARACTERS] or type(error).__name__
  for pattern, words in ERRORS:
    if found := re.fullmatch(pattern, said, re.DOTALL):
      return words.format(*found.groups())
  return said


def _listed(rows: Any) -> str:
  """Rows as Python prints them, as many as are shown."""
  parts, size = [], 0
  for row in rows:
    parts.append(repr(tuple(row)))
    size += len(parts[-1]) + 2
    if size > SHOWN_CHARACTERS:
      return ("[" + ", ".join(parts))[:SHOWN_CHARACTERS]
  return "[" + ", ".join(parts) + "]"


def _describe(database: sqlite3.Connection, words: list[str]) -> list[tuple[Any, ...]]:
  """SHOW TABLES, SHOW DATABASES, DESCRIBE table, SHOW COLUMNS FROM table."""
  shown = words[1].upper() if len(words) > 1 else ""
  if words[0].upper() == "SHOW" and shown in ("TABLES", "DATABASES", "SCHEMAS"):
    names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return [tuple(row) for row in names] if shown == "TABLES" else [("main",)]
  if words[0].upper() == "SHOW" and not ({"COLUMNS", "FIELDS"} & {word.upper() for word in words}):
    raise Refused(f"1064: You have an error in your SQL syntax near '{shown[:80]}'")
  upper = [word.upper() for word in words]
  name = words[upper.index("FROM") + 1] if "FROM" in upper[:-1] else shown and words[1]
  found = database.execute(f"SELECT * FROM {_name(name)} LIMIT 0").description
  return [(column[0], "text", "YES", "", None, "") for column in found]


def _hash(database: sqlite3.Connection, table: str, columns: list[str]) -> str | None:
  """See `answers.table_hash`: here, since an answer may have made the table larger than a result may be."""
  names = ", ".join(map(_name, columns))
  try:
    rows = database.execute(f"SELECT {names} FROM {_name(table)} LIMIT {MAX_ROWS + 1}").fetchall()
  except sqlite3.Error:  # an answer dropped the table, or changed it
    return None
  if not 0 < len(rows) <= MAX_ROWS:
    return None
  joined = [",".join(text(cell) for cell in row if cell is not None) for row in rows]
  prefixes = sorted(hashlib.md5(each.encode(errors="replace")).hexdigest()[:5] for each in joined)
  return hashlib.md5(",".join(prefixes).encode()).hexdigest()


def _authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
  if action == sqlite3.SQLITE_FUNCTION and str(second).lower() == "load_extension":
    return sqlite3.SQLITE_DENY
  return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY


def _name(name: str) -> str:
  return "`" + name.replace("`", "``") + "`"
