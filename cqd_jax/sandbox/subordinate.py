"""User ids that an ordinary user was given beside the own (subuid(5)), and user namespaces that have them."""

import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cqd_jax.sandbox.isolation import PYTHON_FLAGS, RANGE, interpreter
from cqd_jax.sandbox.pool import start_process

FEWEST = 4096
CLIENT_SECONDS = 20.0
HOLD = """
import ctypes, os
if ctypes.CDLL(None).unshare(0x10000000) == 0:
  os.write(1, b"held")
  os.read(0, 1)
"""


def subordinate_ids(kind: str, folder: Path = Path("/etc")) -> tuple[int, int] | None:
  """The first and the number of the ids that this user was given; None if they are too few.

  Args:
    kind: "uid" or "gid".
    folder: of the files subuid and subgid.
  """
  if shutil.which(f"new{kind}map") is None:
    return None
  names = {str(os.getuid())}
  with contextlib.suppress(KeyError):
    names.add(pwd.getpwuid(os.getuid()).pw_name)
  with contextlib.suppress(OSError, ValueError):
    for line in (folder / f"sub{kind}").read_text().splitlines():
      owner, first, count = line.split(":")
      if owner in names and int(count) >= FEWEST:
        return int(first), min(int(count), RANGE)
  return None


def subordinate_count() -> int:
  """How many ids there are of both kinds; 0 where newuidmap, newgidmap or the ids are missing."""
  given = subordinate_ids("uid"), subordinate_ids("gid")
  return min((each[1] if each else 0) for each in given)


@contextlib.contextmanager
def user_namespace() -> Iterator[int]:
  """A descriptor of a new user namespace: its 0 is the caller, its ids from 1 on are the subordinate ones.

  Raises:
    OSError: if it cannot be made, with what was said.
  """
  with contextlib.ExitStack() as stack:
    command = [str(interpreter()), *PYTHON_FLAGS, "-c", HOLD]
    holder = stack.enter_context(start_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    stack.callback(holder.kill)
    assert holder.stdout
    if holder.stdout.read(4) != b"held":
      raise OSError("an ordinary user may make no user namespace")
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
      first, count = subordinate_ids(kind) or (0, 0)
      command = [f"new{kind}map", str(holder.pid), "0", str(own), "1", "1", str(first), str(count)]
      done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False)
      if done.returncode != 0:
        raise OSError(f"new{kind}map: {done.stderr.strip()}")
    descriptor = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)
    stack.callback(os.close, descriptor)
    yield descriptor
