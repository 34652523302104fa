"""The program that makes, watches and removes a private MariaDB server; it ends with whoever started it.

It needs only the standard library and imports nothing of cqd_jax. Its stdin says how (a line of JSON) and stays open:
its end, or that of the process that started it, is the end of the server and of its folder, however it came about. On
stdout it says, a line of JSON each, where the folder is, when the server was started, and what went wrong.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

PR_SET_PDEATHSIG = 1
LOG_CHARACTERS = 800


def main() -> None:
  """Serves until it is told to end."""
  settings = json.loads(sys.stdin.buffer.readline())
  folder = tempfile.mkdtemp(prefix="cqd-mariadb-", dir=settings["place"])
  server: subprocess.Popen[bytes] | None = None
  try:
    for name in ("data", "tmp", "none"):
      os.mkdir(os.path.join(folder, name))
    if settings["uid"] is not None:
      for path in (folder, *(os.path.join(folder, name) for name in os.listdir(folder))):
        os.chown(path, settings["uid"], settings["uid"])
    say(folder=folder)
    install = start(settings, "install", folder)
    if not wait(install, settings["parent"]):
      return
    if install.returncode:
      say(error=f"mariadb-install-db ended with code {install.returncode}: {log_of(folder, 'install')}")
      return
    server = start(settings, "server", folder)
    say(server=server.pid)
    if wait(server, settings["parent"]):
      say(error=f"the server ended with code {server.returncode}: {log_of(folder, 'server')}")
  except OSError as error:
    say(error=str(error))
  finally:
    if server is not None:
      server.kill()
      server.wait()
    shutil.rmtree(folder, ignore_errors=True)


def start(settings: dict[str, Any], which: str, folder: str) -> "subprocess.Popen[bytes]":
  """A program as the unprivileged user, which dies with this one."""
  libc = ctypes.CDLL(None)
  uid = settings["uid"]

  def die_together() -> None:
    if uid is not None:
      os.setgroups([])
      os.setresgid(uid, uid, uid)
      os.setresuid(uid, uid, uid)
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which would clear it

  with open(os.path.join(folder, f"{which}.log"), "wb") as log:
    return subprocess.Popen(
      [word.replace("{folder}", folder) for word in settings[which]],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      cwd=folder,
      env={"PATH": settings["path"], "HOME": folder, "TMPDIR": os.path.join(folder, "tmp"), "LANG": "C.UTF-8"},
      preexec_fn=die_together,  # safe: this program has one thread
    )


def wait(process: "subprocess.Popen[bytes]", parent: int) -> bool:
  """Returns True when the process has ended; kills it and returns False when this program is to end."""
  watched = [os.pidfd_open(process.pid)]
  with contextlib.suppress(OSError):  # it is gone, or hidden from here: then the end of stdin says so
    watched.append(os.pidfd_open(parent))
  poll = select.poll()
  for descriptor in (0, *watched):
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
  ended = watched[0] in [descriptor for descriptor, _ in poll.poll()]
  for descriptor in watched:
    os.close(descriptor)
  if not ended:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.kill()
  process.wait()
  return ended


def say(**message: Any) -> None:
  """A line for who started this; nobody may be there to read it."""
  with contextlib.suppress(OSError):
    os.write(1, json.dumps(message).encode() + b"\n")


def log_of(folder: str, which: str) -> str:
  """What went wrong by what a program said."""
  with open(os.path.join(folder, f"{which}.log"), encoding="utf-8", errors="replace") as log:
    lines = log.read().splitlines()
  wrong = [line for line in lines if "ERROR" in line]
  return " ".join(wrong or lines[-10:])[-LOG_CHARACTERS:]


if __name__ == "__main__":
  main()
