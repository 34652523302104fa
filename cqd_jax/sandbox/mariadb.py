"""A private MariaDB server: unprivileged, in a temporary directory, on a socket of its own, gone with its owner."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cqd_jax.sandbox import mariadb_guardian
from cqd_jax.sandbox.isolation import PYTHON_FLAGS, interpreter, spare_uid

INSTALL = "apt-get install mariadb-server-core mariadb-client-core / dnf install mariadb-server / pacman -S mariadb"
CLIENT = "pip install 'cqd_jax[mariadb]'"
START_SECONDS = 120.0
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/usr/libexec"))

MEMORY = Path("/dev/shm")
NEEDED_BYTES = 4 << 30

# Nothing is to outlive the server, so nothing needs to be on the disk in time.
STORAGE = (
  "--innodb-buffer-pool-size=32M",
  "--innodb-log-file-size=16M",
  "--innodb-flush-log-at-trx-commit=0",
  "--innodb-flush-method=nosync",
  "--skip-innodb-doublewrite",
  "--skip-innodb-file-per-table",
  "--innodb-data-file-path=ibdata1:12M:autoextend:max:1G",  # of all tables together
  "--innodb-temp-data-file-path=ibtmp1:12M:autoextend:max:512M",
)

# What a session may allow itself, and no more.
LIMITS = {
  "sort-buffer-size": "2M",
  "join-buffer-size": "2M",
  "tmp-memory-table-size": "16M",
  "max-heap-table-size": "16M",
  "tmp-disk-table-size": "256M",
  "max-session-mem-used": "256M",
  "group-concat-max-len": "1M",
  "lock-wait-timeout": "2",
  "innodb-lock-wait-timeout": "2",
}
SERVER = (
  "--no-defaults",
  "--datadir={folder}/data",
  "--tmpdir={folder}/tmp",
  "--socket={folder}/socket",
  "--pid-file={folder}/pid",
  "--skip-networking",
  "--skip-name-resolve",
  "--skip-symbolic-links",
  "--sync-frm=0",
  "--enforce-storage-engine=InnoDB",
  "--skip-performance-schema",
  "--local-infile=0",
  "--secure-file-priv={folder}/none",
  "--character-set-server=utf8mb4",
  "--max-allowed-packet=1M",
  "--max-connections=300",
  *(f"--{prefix}{name}={size}" for name, size in LIMITS.items() for prefix in ("", "maximum-")),
)


class MariaDBUnavailable(RuntimeError):
  """There is no server, or no client; the message says what to do."""


def check_client() -> None:
  """Raises MariaDBUnavailable unless the client is installed."""
  if importlib.util.find_spec("pymysql") is None:
    raise MariaDBUnavailable(f"database: a MariaDB or MySQL server is spoken to by PyMySQL: {CLIENT}")


def programs() -> tuple[str, str]:
  """The server and what makes its folder.

  Raises:
    MariaDBUnavailable: if they are not installed.
  """
  found = [
    next(filter(None, (shutil.which(name, path=PATH) for name in names)), None)
    for names in (("mariadbd", "mysqld"), ("mariadb-install-db", "mysql_install_db"))
  ]
  if found[0] is None or found[1] is None:
    raise MariaDBUnavailable(f"database: mariadb is not installed ({INSTALL}); sqlite needs nothing")
  return found[0], found[1]


class PrivateServer:
  """A server that runs as nobody's user, and what connects to it; a context manager.

  Attributes:
    socket: where it listens.
    folder: of its files; gone with it.
    pid: of the server.
  """

  def __init__(self) -> None:
    """Starts it, which takes some seconds.

    Raises:
      MariaDBUnavailable: if it is not installed, or does not start; with what it said.
    """
    self.folder, self.pid = "", 0
    server, install = programs()
    flags = ("--no-defaults", "--datadir={folder}/data", "--tmpdir={folder}/tmp", "--skip-test-db")
    settings: dict[str, Any] = {
      "uid": unprivileged_user(),
      "parent": os.getpid(),
      "path": PATH,
      "place": place(),
      "install": [install, *flags, "--auth-root-authentication-method=normal", *STORAGE],
      "server": [server, *SERVER, *STORAGE],
    }
    self._guardian = subprocess.Popen(
      [str(interpreter()), *PYTHON_FLAGS, str(Path(mariadb_guardian.__file__))],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,  # an interrupt from the keyboard is the owner's affair
    )
    try:
      self._begin(settings)
    except BaseException:
      self.close()
      raise
    self.socket = f"{self.folder}/socket"

  def __enter__(self) -> "PrivateServer":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def ended(self, within: float = 0.0) -> bool:
    """Whether it has ended, or does so within some seconds."""
    if self.pid and not os.path.exists(f"/proc/{self.pid}"):
      within = 10.0  # what watches it is about to end as well
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._guardian.wait(within)
    return self._guardian.returncode is not None

  def close(self) -> None:
    """Ends the server and removes its folder; a second call does nothing."""
    assert self._guardian.stdin
    assert self._guardian.stdout
    with contextlib.suppress(OSError):
      self._guardian.stdin.close()
    try:
      self._guardian.wait(30)
    except subprocess.TimeoutExpired:
      self._guardian.kill()  # the server goes with it
      self._guardian.wait()
    self._guardian.stdout.close()
    if self.folder:  # what somebody killed has removed nothing
      shutil.rmtree(self.folder, ignore_errors=True)

  def _begin(self, settings: dict[str, Any]) -> None:
    assert self._guardian.stdin
    timer = threading.Timer(START_SECONDS, self._guardian.stdin.close)
    timer.start()
    try:
      self._guardian.stdin.write(json.dumps(settings).encode() + b"\n")
      self._guardian.stdin.flush()
      self.folder = str(self._hear("folder"))
      self.pid = int(self._hear("server"))
      self._await_socket()
    except BrokenPipeError as error:
      raise MariaDBUnavailable("database: the private MariaDB server could not be started") from error
    finally:
      timer.cancel()

  def _hear(self, what: str) -> Any:
    assert self._guardian.stdout
    line = self._guardian.stdout.readline()
    message = json.loads(line) if line else {"error": "no answer"}
    if what not in message:
      raise MariaDBUnavailable(f"database: the private MariaDB server did not start: {message.get('error')}")
    return message[what]

  def _await_socket(self) -> None:
    for pause in _pauses():
      if os.path.exists(f"{self.folder}/socket") and os.path.exists(f"{self.folder}/pid"):
        return
      if self.ended():
        self._hear("ready")  # raises with what the server said
      time.sleep(pause)


def unprivileged_user() -> int | None:
  """Who the server is to be: None for the caller, a user whom nobody is for root.

  Raises:
    MariaDBUnavailable: if there is no such user.
  """
  if os.geteuid() != 0:
    return None
  uid = spare_uid(Path("/proc/self/uid_map").read_text()) if sys.platform == "linux" else None
  if uid is None:
    raise MariaDBUnavailable("database: mariadb is never run as root, and no other user is to be had here")
  return uid


def place() -> str | None:
  """Where the server's folder is to be: in memory where there is much of it, since disks are slow to make files."""
  with contextlib.suppress(OSError):
    size = os.statvfs(MEMORY)
    if os.access(MEMORY, os.W_OK | os.X_OK) and size.f_bavail * size.f_frsize >= NEEDED_BYTES:
      return str(MEMORY)
  return None


def _pauses() -> Iterator[float]:
  deadline, pause = time.monotonic() + START_SECONDS, 0.01
  while time.monotonic() < deadline:
    yield pause
    pause = min(pause * 1.5, 0.2)
  raise MariaDBUnavailable(f"database: the private MariaDB server did not start within {START_SECONDS:.0f} seconds")
