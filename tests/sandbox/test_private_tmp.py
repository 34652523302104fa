"""What a harness furnishes is there for every answer, and no answer finds what another did to it."""

import time

import pytest

from cqd_jax.sandbox import sandbox as module
from cqd_jax.sandbox.sandbox import Limits, Sandbox, probe
from cqd_jax.tasks.execution import Harness, Job, Outcome

needs_isolation = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")

FURNISHED = Harness(
  "furnished",
  """
import ctypes, mmap, os, socket, time
def prepare(setup):
  global files
  files = setup
def furnish():
  os.mkdir("kept")
  for name, text in files.items():
    with open(f"kept/{name}", "w") as file:
      file.write(text)
  os.mkdir("kept/empty")
def look():
  found = []
  for folder, folders, names in os.walk("/tmp"):
    for path in [folder] + [f"{folder}/{name}" for name in sorted(names)]:
      s = os.lstat(path)
      text = open(path).read() if path.startswith("/tmp/kept/") and path[-1] in "ab" else None
      young = [abs(t - time.time()) < 3600 for t in (s.st_atime, s.st_mtime)]
      found.append([path, text, oct(s.st_mode), s.st_nlink, s.st_blocks, os.listxattr(path), young])
  return sorted(found, key=str)
def run(payload):
  space = dict(globals())
  exec(payload, space)
  return space["x"]
""",
  setup={"a": "first\n" * 20, "b": "second\n"},
)
EMPTY = Harness("empty", "import os\ndef run(payload):\n  return os.listdir('/tmp')")


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox([FURNISHED, EMPTY], limits=Limits(processes=8), workers=1) as opened:
    yield opened


def execute(sandbox, code):
  """Executes it as if for the first time."""
  return sandbox.run([Job("furnished", f"{code}\n# {time.monotonic_ns()}")])[0]


# Each leaves in x whether it had its way; it may be refused.
TAMPERINGS = {
  "write": "open('kept/a', 'a').write('x'); x = True",
  "write as much, back-date": (
    "s = os.stat('kept/a'); open('kept/a', 'r+').write('F')\n"
    "os.utime('kept/a', ns=(s.st_atime_ns, s.st_mtime_ns))\nx = True"
  ),
  "back-date the access": "os.utime('kept/a', ns=(1, os.stat('kept/a').st_mtime_ns)); x = True",
  "back-date a folder": "os.utime('kept', (1, 1)); x = True",
  "write through a hard link": (
    "os.mkdir('new'); os.link('kept/a', 'new/l'); open('new/l', 'r+').write('F')\n"
    "os.unlink('new/l'); os.rmdir('new'); x = True"
  ),
  "leave a hard link": "os.link('kept/a', 'kept/l'); x = True",
  "replace by an equal": (
    "text = open('kept/a').read(); open('new', 'w').write(text); os.rename('new', 'kept/a')\nx = True\n"
    "os.utime('kept/a', (1, 1))"
  ),
  "swap two": "os.rename('kept/a', 'c'); os.rename('kept/b', 'kept/a'); os.rename('c', 'kept/b'); x = True",
  "lock a file": "os.chmod('kept/a', 0); x = True",
  "lock a folder": "os.chmod('kept/empty', 0); x = True",
  "lock all": "os.chmod('kept', 0); x = True",
  "a pipe": "os.unlink('kept/a'); os.mkfifo('kept/a'); x = True",
  "a link": "os.rename('kept', 'real'); os.symlink('real', 'kept'); x = True",
  "remove all": "import shutil; shutil.rmtree('kept'); x = True",
  "hide a file": "open('kept/empty/c', 'w').close(); x = True",
  "reserve space": (
    "file = open('kept/a', 'r+')\nallocate = ctypes.CDLL(None).fallocate\n"
    "allocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]\n"
    "x = allocate(file.fileno(), 1, 0, 1 << 20) == 0"
  ),
  "a mark": "os.setxattr('kept/b', 'user.mark', b'x'); x = True",
  "a mark on a folder": "os.setxattr('kept/empty', 'user.mark', b'x'); x = True",
  "shared memory": (
    "file = open('kept/a', 'r+b')\nshared = mmap.mmap(file.fileno(), 0)\nx = shared[0]\nshared[0] = 65\nx = True"
  ),
  "shared memory, made writable later": (
    "file = open('kept/a', 'r+b')\nshared = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\nx = True"
  ),
  "a process that writes later": (
    "if os.fork() == 0:\n  os.setsid()\n  time.sleep(0.2)\n  open('kept/a', 'a').write('late')\n  os._exit(0)\nx = True"
  ),
  "a file kept open by sockets": (
    "import array\none, other = socket.socketpair()\nfile = open('kept/a', 'r+')\n"
    "files = array.array('i', [file.fileno(), one.fileno(), other.fileno()]).tobytes()\n"
    "for end in (one, other): end.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])\n"
    "file.write('F'); file.flush(); x = True"
  ),
}  # fmt: skip


@needs_isolation
@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_the_next_answer_finds_everything_as_it_was(sandbox, tampering):
  before = execute(sandbox, "x = look()")
  assert [entry[1] for entry in before.value if entry[1]] == list(FURNISHED.setup.values())
  done = execute(sandbox, TAMPERINGS[tampering])
  if tampering.startswith("shared memory"):
    assert (done.status, "PermissionError" in done.detail) == ("error", True)
  elif not tampering.startswith("a mark"):  # not every kernel has these
    assert done == Outcome("ok", True)
  wait = "time.sleep(0.4)\n" if "later" in tampering else ""
  assert execute(sandbox, f"{wait}x = look()") == before
  assert sandbox.run([Job("empty", tampering)]) == [Outcome("ok", [])]
  assert execute(sandbox, "x = look()") == before


@needs_isolation
def test_memory_shared_between_processes_alone_is_allowed(sandbox):
  code = "memory = mmap.mmap(-1, 100)\nif os.fork() == 0:\n  memory[0] = 7\n  os._exit(0)\nos.wait()\nx = memory[0]"
  assert execute(sandbox, code) == Outcome("ok", 7)


@needs_isolation
def test_what_nobody_changed_is_kept(sandbox):
  look = "x = [[s.st_ctime_ns, s.st_ino] for s in map(os.stat, ('kept', 'kept/a', 'kept/b'))]"
  first = execute(sandbox, look)
  assert execute(sandbox, "x = [open('kept/a').read(), os.listdir('kept')]").status == "ok"
  assert execute(sandbox, look) == first
  execute(sandbox, "os.unlink('kept/b'); x = 0")
  assert execute(sandbox, look) != first


@needs_isolation
def test_a_harness_that_cannot_furnish_fails_at_the_start():
  source = "def run(payload): pass\ndef furnish(): open('large', 'wb').write(bytes(1 << 20))"
  with pytest.raises(RuntimeError, match="No space left"):
    Sandbox([Harness("large", source)], limits=Limits(tmp_bytes=1 << 16), workers=1)


def test_without_isolation_every_job_has_its_own(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  module._find_mode.cache_clear()
  try:
    with Sandbox([FURNISHED], workers=1, unsafe=True) as opened:
      assert execute(opened, "x = open('kept/b').read(); os.unlink('kept/b')") == Outcome("ok", "second\n")
      assert execute(opened, "x = os.path.exists('kept/b')") == Outcome("ok", True)
  finally:
    module._find_mode.cache_clear()
