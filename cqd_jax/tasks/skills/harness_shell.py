"""Executes a shell command in small file trees. Sent to the sandbox as text: the standard library alone."""

import itertools
import os
from typing import Any

MAX_OUTPUT = 4000
MAX_FILE = 4000
MAX_FILES = 300

# Every byte is a character of Latin-1, so different bytes never read as the same text.
ENCODING = "latin-1"

TREES: list[dict[str, bytes]] = []
COUNTER = itertools.count()


def prepare(setup: list[dict[str, str]]) -> None:
  """Keeps the trees, each file's content by its path."""
  TREES[:] = [{path: text.encode(ENCODING) for path, text in tree.items()} for tree in setup]


def run(answer: str) -> list[dict[str, Any]]:
  """Runs `sh -c ANSWER` in a fresh copy of each tree, up to the first where it does nothing at all.

  Returns:
    For each tree {"stdout": its first characters, "status": exit status, "changes": what is otherwise than before}:
    a file's new content by its path, None where it is gone; names of other things end in "/" or "?". A command that
    prints nothing and changes nothing is right for no question, and the trees left are spared.

  Raises:
    OverflowError: if the command leaves more than `MAX_FILES` files and folders.
  """
  results = []
  for tree in TREES:
    results.append(_run_in(tree, answer))
    if not results[-1]["stdout"] and not results[-1]["changes"]:
      break
  return results


def _run_in(tree: dict[str, bytes], answer: str) -> dict[str, Any]:
  # the same name in every sandbox, where the process number is; `tempfile` would draw one, and take longer
  root = f"{os.environ.get('TMPDIR', '/tmp')}/tree-{os.getpid()}-{next(COUNTER)}"
  os.mkdir(root)
  os.chdir(root)
  folders = {path.partition("/")[0] + "/" for path in tree}
  for folder in folders:
    os.mkdir(folder)
  for path, content in tree.items():
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(file, content)
    os.close(file)
  stdout, status = _execute(answer, root)
  # by its full path: the command may have removed the folder that we are in
  after = _scan(root)
  before = {**tree, **dict.fromkeys(folders, b"")}
  changes: dict[str, str | None] = {path: None for path in before if path not in after}
  for path, found in after.items():
    if before.get(path) != found:
      changes[path] = found.decode(ENCODING)
  return {"stdout": stdout.decode(ENCODING), "status": status, "changes": changes}


def _execute(answer: str, root: str) -> tuple[bytes, int]:
  read_end, write_end = os.pipe()
  child = os.posix_spawn(
    "/bin/sh",
    ["sh", "-c", answer],
    {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": root},
    file_actions=[
      (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
      (os.POSIX_SPAWN_DUP2, write_end, 1),
      (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ],
  )
  os.close(write_end)
  stdout = b""
  while len(stdout) <= MAX_OUTPUT and (read := os.read(read_end, MAX_OUTPUT)):
    stdout += read
  os.close(read_end)  # who still writes gets a broken pipe
  return stdout[: MAX_OUTPUT + 1], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _scan(root: str) -> dict[str, bytes]:
  found: dict[str, bytes] = {}
  pending = [""]
  while pending:
    folder = pending.pop()
    try:
      entries = list(os.scandir(os.path.join(root, folder)))
    except OSError:
      entries = []
      found[folder + "?"] = b""
    for entry in entries:
      if len(found) >= MAX_FILES:
        raise OverflowError(f"the command left more than {MAX_FILES} files and folders")
      name = folder + os.fsencode(entry.name).decode(ENCODING)
      if entry.is_dir(follow_symlinks=False):
        found[name + "/"] = b""
        pending.append(os.path.join(folder, entry.name, ""))
      elif entry.is_file(follow_symlinks=False):
        found[name] = _read(entry.path)
      else:
        found[name + "?"] = b""
  return found


def _read(path: str) -> bytes:
  try:
    # neither following a link nor waiting at a pipe, should a process left behind have put one there
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
  except OSError:
    return b"unreadable"
  content = os.read(file, MAX_FILE)
  os.close(file)
  return content
