"""Executes a shell command in small file trees. Sent to the sandbox as text: only the standard library."""

import os
import time
from typing import Any

MAX_OUTPUT = 4000
MAX_FILE = 4000
MAX_FILES = 300

# Every byte is a character of Latin-1, so different bytes never read as the same text.
ENCODING = "latin-1"

TREES: list[dict[str, bytes]] = []
FOLDERS: list[set[str]] = []
WRITTEN: list[dict[str, tuple[int, int]]] = []

# The kernel's clock ticks every 10 ms or faster; a change within the tick of the one before may get the same time.
TICK_NS = 20_000_000


def prepare(setup: list[dict[str, str]]) -> None:
  """Keeps the trees, each file's content by its path."""
  TREES[:] = [{path: text.encode(ENCODING) for path, text in tree.items()} for tree in setup]
  FOLDERS[:] = [{path.partition("/")[0] + "/" for path in tree} for tree in TREES]


def furnish() -> None:
  """Writes the trees to 0/tree, 1/tree, ... here; a command is to see nothing else beside the one that it runs in."""
  home = os.getcwd()
  WRITTEN.clear()
  for number, (tree, folders) in enumerate(zip(TREES, FOLDERS, strict=True)):
    os.makedirs(f"{number}/tree")
    os.chdir(f"{number}/tree")
    for folder in sorted(folders):
      os.mkdir(folder)
    for path, content in tree.items():
      file = os.open(path, os.O_WRONLY | os.O_CREAT)
      os.write(file, content)
      os.close(file)
    WRITTEN.append({path: _look(path) for path in (".", *folders, *tree)})
    os.chdir(home)


def _look(path: str) -> tuple[int, int]:
  state = os.lstat(path)
  return state.st_ctime_ns, state.st_ino


def run(answer: str) -> list[dict[str, Any]]:
  """Runs `sh -c ANSWER` in each tree that `furnish` wrote here, up to the first where it finds nothing.

  Returns:
    For each tree {"stdout": its first characters, "status": exit status, "changes": what is otherwise than before}:
    a file's new content by its path, None where it is gone; names of other things end in "/" or "?". A command that
    prints nothing, or counts none, and changes nothing is right for no question, and the trees left are spared.

  Raises:
    OverflowError: if the command leaves more than `MAX_FILES` files and folders.
  """
  results = []
  home = os.getcwd()
  for number in range(len(TREES)):
    results.append(_run_in(f"{home}/{number}/tree", number, answer))
    if results[-1]["stdout"] in ("", "0\n") and not results[-1]["changes"]:
      break
  return results


def _run_in(root: str, number: int, answer: str) -> dict[str, Any]:
  os.chdir(root)
  # of a tree just written, a change need not show in the times
  telling = max(WRITTEN[number].values())[0] < time.time_ns() - TICK_NS
  stdout, status = _execute(answer, root)
  if telling and _is_untouched(root, number):
    return {"stdout": stdout.decode(ENCODING), "status": status, "changes": {}}
  before = {**TREES[number], **dict.fromkeys(FOLDERS[number], b"")}
  after = _scan(root)
  changes: dict[str, str | None] = {path: None for path in before if path not in after}
  for path, found in after.items():
    if before.get(path) != found:
      changes[path] = found.decode(ENCODING)
  return {"stdout": stdout.decode(ENCODING), "status": status, "changes": changes}


def _is_untouched(root: str, number: int) -> bool:
  """Whether no time of change has moved; who changes an entry of a folder changes the folder."""
  try:
    os.chdir(root)  # the command may have removed the folder that we are in
    return all(_look(path) == look for path, look in WRITTEN[number].items())
  except OSError:
    return False


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
  """What is in the tree, by the path; without following a link, or waiting at a pipe that somebody left."""
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
