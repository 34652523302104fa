"""Executes a dialogue's statements on a MariaDB or MySQL server, each job in a database and as a user of its own."""

import contextlib
import dataclasses
import itertools
import secrets
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cqd_jax.sandbox.mariadb import PrivateServer, check_client
from cqd_jax.tasks.dbbench.answers import table_hash
from cqd_jax.tasks.execution import Execute, Job, Outcome, Service

VERSION = "1"
"""Of what a job's outcome depends on in this file."""

MAX_ROWS = 5000
SHOWN_CHARACTERS = 1000
ROWS_TO_SKIP = 2000
ADMIN_SECONDS = 30.0

RIGHTS = "SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX, CREATE TEMPORARY TABLES"

COLLATIONS = ("utf8mb4_0900_ai_ci", "uca1400_nopad_ai_ci", "utf8mb4_unicode_520_nopad_ci", "utf8mb4_general_ci")
"""MySQL's own, for which the data were made, and what is nearest to it in MariaDB."""

SQL_MODE = "ONLY_FULL_GROUP_BY,NO_ZERO_IN_DATE,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION"
"""MySQL's default without STRICT_TRANS_TABLES: a strict server refuses updates that the published hashes have seen."""

# What a statement can ask of time and chance is the same at every replay.
SESSION = f"SET sql_mode = '{SQL_MODE}', timestamp = 1704067200, rand_seed1 = 1, rand_seed2 = 2, time_zone = '+00:00'"

LOST = (0, 2002, 2003, 2006, 2013, 2055)
"""Codes of errors that mean that a connection is gone, or cannot be had."""

ACCESS_DENIED = 1045
INTERRUPTED = 1317
GRACE_SECONDS = 2.0
ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Address:
  """Where a server is, and as whom it is spoken to: a user who may make databases and users.

  Attributes:
    options: of `pymysql.connect`.
    host: from where the users that are made may come.
  """

  options: dict[str, Any]
  host: str = "localhost"


def parse_dsn(dsn: str) -> Address:
  """Reads mysql://USER:PASSWORD@HOST:PORT or mysql://USER:PASSWORD@/?unix_socket=PATH.

  Raises:
    ValueError: if it is neither; its password is not repeated.
  """
  form = "mysql://USER:PASSWORD@HOST:PORT or mysql://USER:PASSWORD@/?unix_socket=PATH"
  try:
    parts = urllib.parse.urlsplit(dsn)
    port = parts.port
  except ValueError as error:
    raise ValueError(f"database: expected {form} ({error})") from None
  asked = dict(urllib.parse.parse_qsl(parts.query))
  place = {"unix_socket": asked["unix_socket"]} if "unix_socket" in asked else {"host": parts.hostname}
  if parts.scheme not in ("mysql", "mariadb") or not parts.username or not all(place.values()):
    raise ValueError(f"database: expected sqlite, mariadb, or {form}, got one of scheme {parts.scheme!r}")
  if unknown := set(asked) - {"unix_socket"}:
    raise ValueError(f"database: expected no option but unix_socket, got {sorted(unknown)[0]!r}")
  user, password = map(urllib.parse.unquote, (parts.username, parts.password or ""))
  return Address({**place, "port": port or 3306, "user": user, "password": password}, host="%")


def sql_service(name: str, *, dsn: str | None = None, seconds: float = 5.0) -> Service:
  """A service that executes jobs of `cqd_jax.tasks.dbbench` on a server.

  Args:
    name: of the service.
    dsn: of a server that is there; None: a private MariaDB is started with the first job.
    seconds: after which a statement is ended.

  Raises:
    ValueError: if the DSN is none, or the seconds are out of range.
  """
  if not 0.05 <= seconds <= 3600:
    raise ValueError(f"seconds: expected 0.05 <= seconds <= 3600, got {seconds}")
  address = None if dsn is None else parse_dsn(dsn)

  @contextlib.contextmanager
  def start(workers: int, unsafe: bool) -> Iterator[Execute]:
    del unsafe  # SQL is shut in by the server
    check_client()
    with contextlib.ExitStack() as stack:
      servers = Servers(address)
      stack.callback(servers.close)
      pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="sql"))
      runner = Runner(servers, seconds)

      def execute(jobs: Sequence[Job]) -> list[Outcome]:
        return list(pool.map(runner.run, jobs))

      servers.address()  # what does not start is to say so now
      yield execute

  where = "private" if address is None else "given"
  return Service(name, f"{VERSION} {where} server, {seconds} seconds", start)


class Servers:
  """The server, which is started again where an answer ended it. Threads share it."""

  def __init__(self, given: Address | None):
    self._given, self._private = given, None if given else PrivateServer()
    self._lock = threading.Lock()

  def address(self) -> Address:
    """Of the server as it is now."""
    with self._lock:
      if self._given is not None:
        return self._given
      if self._private is None or self._private.ended():
        self.close()
        self._private = PrivateServer()
      return Address({"unix_socket": self._private.socket, "user": "root"})

  def lost(self) -> None:
    """A connection was lost: waits a little, should a private server have ended."""
    if private := self._private:
      private.ended(within=1.0)

  def close(self) -> None:
    """Ends a private one."""
    private, self._private = self._private, None
    if private is not None:
      private.close()


class Runner:
  """Executes one job at a time in each thread."""

  def __init__(self, servers: Servers, seconds: float):
    self._servers, self._seconds = servers, seconds
    self._names = (f"cqd{secrets.token_hex(4)}x{number}" for number in itertools.count())
    self._collation = ""
    self._lock, self._again = threading.Lock(), threading.Lock()

  def run(self, job: Job) -> Outcome:
    """See `cqd_jax.tasks.dbbench.episode.DBBench.harness` for payload and value.

    Where the server ended, the job is tried again by itself: an answer that ends it must not fail another.
    """
    import pymysql

    detail = ""
    for attempt in range(ATTEMPTS):
      try:
        with self._again if attempt else contextlib.nullcontext():
          return Outcome("ok", self._run(job.payload))
      except pymysql.err.Error as error:
        detail = str(error)[:500]
        if not _is_lost(error):
          return Outcome("error", detail=detail)
        self._servers.lost()
    return Outcome("killed", detail=detail)

  def _run(self, payload: Any) -> dict[str, Any]:
    with self._lock:
      name = next(self._names)
    address = self._servers.address()
    with contextlib.closing(connect(address, read_timeout=ADMIN_SECONDS)) as admin:
      session = Session(admin, address, name, self._seconds, self._collation_of(admin))
      try:
        session.prepare(payload["table"], payload["columns"], payload["rows"])
        observation = ""
        for statement in payload["statements"]:
          observation = session.observe(statement)
        hashed = session.table_hash(payload["table"], payload["columns"]) if payload["hash"] else None
        return {"observation": observation, "hash": hashed}
      finally:
        session.remove()

  def _collation_of(self, admin: Any) -> str:
    if not self._collation:
      with admin.cursor() as cursor:
        cursor.execute("SHOW COLLATION WHERE `Collation` IN %s", (COLLATIONS,))
        known = {row[0] for row in cursor.fetchall()}
      self._collation = next(each for each in COLLATIONS if each in known)
    return self._collation


def connect(address: Address, **options: Any) -> Any:
  """A connection in utf8mb4 that commits each statement."""
  import pymysql

  # a socket is not encrypted, and to prepare for it would take longer than all the rest
  plain = {"ssl_disabled": True} if "unix_socket" in address.options else {}
  options = {**address.options, **plain, **options}
  return pymysql.connect(**options, charset="utf8mb4", autocommit=True, connect_timeout=30)


class Session:
  """A database and a user, both of one name, for one job."""

  def __init__(self, admin: Any, address: Address, name: str, seconds: float, collation: str):
    self._admin, self._address, self._name, self._seconds = admin, address, name, seconds
    self._collation = collation
    self._user = f"'{name}'@'{address.host}'"
    self._password = secrets.token_hex(16)

  def prepare(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
    """Makes the database with its table, and the user with rights on it only."""
    with self._admin.cursor() as cursor:
      cursor.execute(f"CREATE DATABASE `{self._name}` CHARACTER SET utf8mb4 COLLATE {self._collation}")
      cursor.execute(f"CREATE USER {self._user} IDENTIFIED BY '{self._password}' WITH MAX_USER_CONNECTIONS 5")
      cursor.execute(f"GRANT {RIGHTS} ON `{self._name}`.* TO {self._user}")
      declared = ", ".join(f"{quoted(column)} TEXT" for column in columns)
      cursor.execute(f"CREATE TABLE `{self._name}`.{quoted(table)} ({declared})")
      places = ", ".join(["%s"] * len(columns))
      cursor.executemany(
        f"INSERT INTO `{self._name}`.{quoted(table).replace('%', '%%')} VALUES ({places})", [tuple(row) for row in rows]
      )

  def observe(self, statement: str) -> str:
    """What a statement gives, as a client prints it: a list of rows, or the error. Each has a connection of its own."""
    import pymysql

    shown = ""
    try:
      connection = self._connect()
    except pymysql.err.Error as error:  # an answer dropped its database
      return self._in_words(error)
    watch = Watch(self._admin, connection.thread_id(), self._seconds)
    with contextlib.closing(connection), watch:
      try:
        with contextlib.closing(connection.cursor(pymysql.cursors.SSCursor)) as cursor:
          cursor.execute(statement)
          listed, whole = _listed(cursor)
          shown = self._nameless(listed)
          if not whole:
            watch.kill("QUERY")
          return shown
      except pymysql.err.Error as error:
        if watch.late:
          return f"1317: Query execution was interrupted: it took more than {self._seconds:g} seconds"
        if not _is_lost(error):
          return shown if error.args[0] == INTERRUPTED else self._in_words(error)
        self._admin.ping(reconnect=False)  # raises where it is the server that is gone
        return self._in_words(error)
      except (UnicodeError, ValueError, OverflowError) as error:  # values that Python has no form for
        return str(error)[:SHOWN_CHARACTERS]

  def _connect(self) -> Any:
    """A connection of the user, whatever it did to its account."""
    import pymysql

    own = Address({**self._address.options, "user": self._name, "password": self._password})
    options = {"database": self._name, "read_timeout": self._seconds + ADMIN_SECONDS, "init_command": SESSION}
    try:
      return connect(own, **options)
    except pymysql.err.OperationalError as error:
      if error.args[0] != ACCESS_DENIED:
        raise
    with self._admin.cursor() as cursor:
      cursor.execute(f"ALTER USER {self._user} IDENTIFIED BY '{self._password}'")
    return connect(own, **options)

  def table_hash(self, table: str, columns: Sequence[str]) -> str | None:
    """The hash of the table; None where it is gone, changed or too large."""
    import pymysql

    names = ", ".join(map(quoted, columns))
    query = f"SELECT SUBSTRING(MD5(CONCAT_WS(',', {names})), 1, 5) FROM `{self._name}`.{quoted(table)}"
    try:
      with self._admin.cursor() as cursor:
        cursor.execute(f"{query} LIMIT {MAX_ROWS + 1}")
        rows = cursor.fetchall()
    except (pymysql.err.ProgrammingError, pymysql.err.OperationalError) as error:
      if _is_lost(error):
        raise
      return None
    return table_hash(row[0] for row in rows) if len(rows) <= MAX_ROWS else None

  def remove(self) -> None:
    """Ends what still runs and drops the user and the database; what fails is left to the server's own end."""
    import pymysql

    with contextlib.suppress(pymysql.err.Error), self._admin.cursor() as cursor:
      cursor.execute(f"DROP USER IF EXISTS {self._user}")
      self._kill(cursor)
      try:
        cursor.execute(f"DROP DATABASE IF EXISTS `{self._name}`")
      except pymysql.err.OperationalError:  # a prepared transaction holds it
        self._roll_back(cursor)
        cursor.execute(f"DROP DATABASE IF EXISTS `{self._name}`")

  def _kill(self, cursor: Any) -> None:
    """Returns when none of the user's connections is left."""
    deadline = time.monotonic() + ADMIN_SECONDS
    while time.monotonic() < deadline:
      cursor.execute("SELECT id FROM information_schema.processlist WHERE user = %s", (self._name,))
      if not (left := cursor.fetchall()):
        return
      for (identity,) in left:
        with contextlib.suppress(Exception):
          cursor.execute(f"KILL CONNECTION {identity}")
      time.sleep(0.01)

  def _roll_back(self, cursor: Any) -> None:
    cursor.execute("XA RECOVER")
    for _, length, _, data in cursor.fetchall():
      if len(data) == length:
        cursor.execute("XA ROLLBACK %s", (data,))

  def _in_words(self, error: Exception) -> str:
    code, *text = error.args or ("",)
    return self._nameless(f"{code}: {text[0]}" if text else str(error))[:SHOWN_CHARACTERS]

  def _nameless(self, text: str) -> str:
    """Without the name, which differs from replay to replay."""
    return text.replace(f"'{self._name}.", "'").replace(self._name, "database")


class Watch:
  """Ends a statement after some seconds; a context manager.

  Attributes:
    late: whether it did.
  """

  def __init__(self, admin: Any, identity: int, seconds: float):
    self.late = False
    self._admin, self._identity, self._seconds = admin, identity, seconds
    self._done, self._lock = threading.Event(), threading.Lock()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> "Watch":
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._done.set()
    self._thread.join()

  def kill(self, what: str) -> None:
    """Ends the "QUERY" or the "CONNECTION"."""
    import pymysql

    with self._lock, contextlib.suppress(pymysql.err.Error), self._admin.cursor() as cursor:
      cursor.execute(f"KILL {what} {self._identity}")

  def _watch(self) -> None:
    if not self._done.wait(self._seconds):
      self.late = True
      self.kill("QUERY")
      if not self._done.wait(GRACE_SECONDS):
        self.kill("CONNECTION")


def _is_lost(error: Exception) -> bool:
  return bool(error.args) and error.args[0] in LOST


def quoted(name: str) -> str:
  """A name of a table or column in SQL."""
  return "`" + name.replace("`", "``") + "`"


def _listed(cursor: Any) -> tuple[str, bool]:
  """Rows as Python prints them, as many as are shown; and whether these were all, or nearly."""
  parts: list[str] = []
  size = skipped = 0
  while cursor.description:
    row = cursor.fetchone()
    if row is None:
      break
    if size <= SHOWN_CHARACTERS:
      parts.append(repr(row))
      size += len(parts[-1]) + 2
    elif (skipped := skipped + 1) > ROWS_TO_SKIP:
      return f"[{', '.join(parts)}"[:SHOWN_CHARACTERS], False
  return f"[{', '.join(parts)}]"[:SHOWN_CHARACTERS], True
