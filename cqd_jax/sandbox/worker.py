"""The program that runs inside the sandbox: executes one untrusted answer after another, each in a child of its own.

It needs only the standard library and imports nothing of cqd_jax, so it runs wherever an interpreter is. Its stdin is
a socket to the parent (`cqd_jax.sandbox.pool`). Each message there is the index of a harness and one end of a channel,
a socket of its own for one job, and is answered by a notice of one byte when nothing of that job is alive. What the
channel carries passes between the parent and the job's child alone:

  to the child     a random word, the index, the payload
  to the parent    the word, a status, JSON of the value or a line of detail

So the process that forks never holds a payload or a result, and no child inherits a trace of the jobs before it. The
first message is for the worker itself: the settings and harnesses, answered by READY, or FAILED with a traceback.

A job's child is the first process of a process namespace of its own, so that killing it kills whatever it started;
it finds a /tmp that is empty, or holds what the harness's `furnish` wrote, untouched; it has no capabilities, and no
open file but its channel. What it writes there is untrusted: the word stands against accidents and blind forgeries,
yet an answer that searches its own memory can find the word and claim any value. So a verdict must come from comparing
the value with something that never entered the sandbox.
"""

# Each shared library mapped here makes every fork slower by some 20 microseconds: import few modules that have one.
# `socket` on top of `_socket` is a hundred enumerations, whose pages every fork has to do with.
import _socket
import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

OK, ERROR, TIMEOUT, KILLED, OVERFLOW, READY, FAILED = range(7)

ENDED, LATE, SPENT = range(3)
"""Notices of how a job's process ended: on its own or by what it did; at the deadline; at the limit of CPU time."""

ORDER = struct.Struct("!I")
"""A message to the worker: the index of the harness. The channel comes with it."""

CHANNEL = struct.Struct("=i")
"""A file descriptor, as the kernel passes it."""

Furnish = Callable[[], None]

JOB = struct.Struct("!II")
"""Head of a job: index of the harness, bytes of the payload that follow."""

REPLY = struct.Struct("!BI")
"""Head of a reply: status, bytes of the body that follow."""

WORD_BYTES = 16
DETAIL_CHARACTERS = 500
MAX_DEPTH = 100

CLONE_NEWPID = 0x20000000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_CAP_AMBIENT = 24, 38, 22, 47
PR_CAP_AMBIENT_CLEAR_ALL, SECCOMP_MODE_FILTER = 4, 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522


def find_non_json(value: Any) -> str:
  """Says what in `value` is not of JSON's types ("value[0] is a tuple"); "" where all of it is.

  Stricter than `json.dumps`, which would turn tuples into lists and the key 1 into "1" without a word. NaN and
  infinities are no JSON here, nor is what is deeper than `MAX_DEPTH` levels or contains itself.
  """
  pending = [("value", value, 0)]
  while pending:
    path, item, depth = pending.pop()
    kind = type(item)
    if depth > MAX_DEPTH:
      return f"it is deeper than {MAX_DEPTH} levels"
    if kind is list:
      pending.extend((f"{path}[{index}]", entry, depth + 1) for index, entry in enumerate(item))
    elif kind is dict:
      for key, entry in item.items():
        if type(key) is not str:
          return f"a key of {path[:80]} is a {type(key).__name__}"
        pending.append((f"{path}[{key[:20]!r}]", entry, depth + 1))
    elif kind is float:
      if item != item or item in (float("inf"), -float("inf")):
        return f"{path[:80]} is {item}"
    elif item is not None and kind not in (str, int, bool):
      return f"{path[:80]} is a {kind.__name__}"
  return ""


LIBC = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: Any) -> None:
  if getattr(LIBC, function)(*arguments) != 0:
    code = ctypes.get_errno()
    raise OSError(code, f"{function}: {os.strerror(code)}")


def _limit_all(limits: dict[str, Any], *, isolated: bool) -> None:
  """Sets the limits that every job inherits. That of CPU time is each job's own: it would end the worker."""
  values = {
    "RLIMIT_AS": limits["memory_bytes"],
    "RLIMIT_FSIZE": limits["file_bytes"],
    "RLIMIT_NOFILE": limits["open_files"],
    "RLIMIT_CORE": 0,
  }
  if isolated:
    values |= {"RLIMIT_NPROC": limits["processes"], "RLIMIT_MEMLOCK": 0, "RLIMIT_MSGQUEUE": 0}
  # Systems without isolation (macOS) refuse some limits; there they are a courtesy, not a wall.
  refused = () if isolated else (OSError, ValueError, AttributeError)
  for name, value in values.items():
    with contextlib.suppress(*refused):
      resource.setrlimit(getattr(resource, name), (value, value))


def _control(option: int, *arguments: int) -> None:
  _call("prctl", option, *map(ctypes.c_ulong, (*arguments, 0, 0, 0, 0)[:4]))


def _give_up_powers() -> None:
  """What the worker itself never needs is gone for good, for it and for all that it starts."""
  _control(PR_SET_NO_NEW_PRIVS, 1)
  _control(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
  with contextlib.suppress(OSError):  # raised past the last capability that the kernel knows
    for capability in range(64):
      _control(PR_CAPBSET_DROP, capability)


def _filter_system_calls(program: bytes) -> None:
  class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

  header = Program(len(program) // 8, program)
  _control(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


class NamespaceJail:
  """Isolation by namespaces: how a job's process is started, shut in, and ended."""

  def __init__(self, settings: dict[str, Any]):
    self.uid: int | None = settings["uid"]
    tmp = _load_module("sandbox_tmp", settings["tmp"])
    self.tmp = tmp.Tmp(settings["limits"]["tmp_bytes"], self.uid)
    self.lay: Callable[[Furnish | None], None] = self.tmp.lay
    self.itself = os.pidfd_open(os.getpid())
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    self.no_capabilities = (header, bytes(24))
    _give_up_powers()
    _filter_system_calls(bytes.fromhex(settings["seccomp"]))

  def start(self) -> int:
    """Forks; returns the child's id, or 0 in the child, which is process 1 of a new process namespace.

    Only the next child is to be in the new namespace: going back to one's own lets `unshare` be called again.
    """
    _call("unshare", CLONE_NEWPID)
    child = os.fork()
    if child:
      _call("setns", self.itself, CLONE_NEWPID)
    return child

  def enter(self) -> None:
    """In the child: /tmp as the working directory, an unprivileged user, no capabilities."""
    os.setsid()  # or `kill(0, ...)` would reach the worker through their common process group
    os.chdir("/tmp")
    if self.uid is not None:
      os.setgroups([])
      os.setresgid(self.uid, self.uid, self.uid)
      os.setresuid(self.uid, self.uid, self.uid)
    else:  # leaving user 0 took the capabilities; another user still has them
      _call("capset", *self.no_capabilities)

  def wait(self, child: int, deadline: float) -> bool:
    """Returns when the child has ended, or False at the deadline (monotonic seconds)."""
    watched = os.pidfd_open(child)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    ended = poll.poll(max(deadline - time.monotonic(), 0.0) * 1000 + 1)
    os.close(watched)
    return bool(ended)

  def end(self, child: int) -> tuple[int, Any]:
    """Kills all of the job's processes and removes its files; returns the child's wait status and usage."""
    os.kill(child, signal.SIGKILL)
    ended = os.wait4(child, 0)[1:]
    self.tmp.clear()
    return ended


class UnisolatedJail:
  """No isolation: limits, and a process group that is killed. A process that leaves the group stays."""

  def __init__(self) -> None:
    # Not at the top: their libraries would slow down the forks of the isolated worker.
    import shutil
    import tempfile

    self._make, self._remove = tempfile.mkdtemp, shutil.rmtree
    self.folder = ""
    self.furnish: Furnish | None = None
    self.ended: tuple[int, Any] | None = None

  def lay(self, furnish: Furnish | None) -> None:
    """Has the next job's folder furnished."""
    self.furnish = furnish

  def start(self) -> int:
    """Forks, with a new folder."""
    self.folder = self._make(prefix="cqd-unsafe-")
    return os.fork()

  def enter(self) -> None:
    """In the child: a process group and a folder of its own."""
    os.setsid()
    os.chdir(self.folder)
    if self.furnish:
      self.furnish()

  def wait(self, child: int, deadline: float) -> bool:
    """Returns when the child has ended, or False at the deadline (monotonic seconds)."""
    pause = 0.0002
    while True:  # systems without isolation (macOS) have no file descriptors of processes
      process, status, usage = os.wait4(child, os.WNOHANG)
      if process:
        self.ended = (status, usage)
        return True
      if time.monotonic() > deadline:
        return False
      time.sleep(pause)
      pause = min(2 * pause, 0.01)

  def end(self, child: int) -> tuple[int, Any]:
    """Kills the process group, removes the folder; returns the child's wait status and usage."""
    # No `setsid` yet means no such group: only the child is there to kill.
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(child, signal.SIGKILL)
    ended, self.ended = self.ended, None
    if ended is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
      ended = os.wait4(child, 0)[1:]
    self._remove(self.folder, ignore_errors=True)
    return ended


def _describe(error: BaseException) -> str:
  try:
    return f"{type(error).__name__}: {error}"[:DETAIL_CHARACTERS]
  except BaseException:
    return "an exception that cannot be shown"


ENCODE = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


def _execute(run: Callable[[Any], Any], channel: int, result_bytes: int) -> tuple[int, bytes]:
  try:
    value = run(json.loads(_read_message(channel)))
  except BaseException as error:
    return ERROR, _describe(error).encode(errors="backslashreplace")
  try:
    if reason := find_non_json(value):
      return ERROR, f"returned no JSON: {reason}".encode(errors="backslashreplace")
    body = ENCODE(value).encode()
  except BaseException as error:  # an integer of too many digits, no memory left
    return ERROR, b"returned no JSON: " + _describe(error).encode(errors="backslashreplace")
  if len(body) > result_bytes:
    return OVERFLOW, f"a result of {len(body)} bytes; {result_bytes} are allowed".encode()
  return OK, body


class Executor:
  """Executes jobs one at a time, each in a new process."""

  def __init__(self, settings: dict[str, Any], modules: list[types.ModuleType]):
    self.limits: dict[str, Any] = settings["limits"]
    self.times: list[dict[str, Any]] = settings["times"]
    self.runs: list[Callable[[Any], Any]] = [module.run for module in modules]
    self.furnishings: list[Furnish | None] = [getattr(module, "furnish", None) for module in modules]
    self.isolated: bool = settings["isolated"]
    self.jail: NamespaceJail | UnisolatedJail = NamespaceJail(settings) if self.isolated else UnisolatedJail()
    for furnish in self.furnishings:
      self.jail.lay(furnish)  # what fails is to fail now

  def __call__(self, index: int, channel: int) -> int:
    """Has one job executed, and closes the channel; returns the notice of how its process ended."""
    self.jail.lay(self.furnishings[index])
    deadline = time.monotonic() + self.times[index]["wall_seconds"]
    child = self.jail.start()
    if not child:
      self._be_the_child(index, channel)
    os.close(channel)
    in_time = self.jail.wait(child, deadline)
    wait_status, usage = self.jail.end(child)
    if not in_time:
      return LATE
    # What else kills so is the end of memory. The limit's clock and that of the usage may differ by a good deal.
    killed = os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGKILL
    return SPENT if killed and usage.ru_utime + usage.ru_stime > self.times[index]["cpu_seconds"] / 2 else ENDED

  def _be_the_child(self, index: int, channel: int) -> None:
    # Nothing may ever leave this function: the caller's loop belongs to the worker.
    try:
      self.jail.enter()
      os.closerange(3, channel)
      os.closerange(channel + 1, self.limits["open_files"])
      resource.setrlimit(resource.RLIMIT_CPU, (self.times[index]["cpu_seconds"],) * 2)
      if "random" in sys.modules:
        sys.modules["random"].seed(0)
      gc.enable()
      word = _read_exactly(channel, WORD_BYTES)
      status, body = _execute(self.runs[index], channel, self.limits["result_bytes"])
      _write_all(channel, word + REPLY.pack(status, len(body)) + body)
    finally:
      os._exit(0)


def _read_message(channel: int) -> bytes:
  """Reads what comes to a channel after the word."""
  return _read_exactly(channel, JOB.unpack(_read_exactly(channel, JOB.size))[1])


def _read_exactly(descriptor: int, size: int) -> bytes:
  """Reads `size` bytes; "" at the end."""
  parts = []
  while size:
    chunk = os.read(descriptor, min(size, 1 << 20))
    if not chunk:
      return b""
    parts.append(chunk)
    size -= len(chunk)
  return b"".join(parts)


def _write_all(descriptor: int, content: bytes) -> None:
  while content:
    content = content[os.write(descriptor, content) :]


def _load_module(name: str, source: str) -> types.ModuleType:
  module = types.ModuleType(name)
  sys.modules[name] = module
  exec(compile(source, f"<{name}>", "exec"), module.__dict__)
  return module


def _load(harnesses: list[dict[str, Any]]) -> list[types.ModuleType]:
  modules = []
  for harness in harnesses:
    module = _load_module(f"harness_{harness['name']}", harness["source"])
    if not callable(getattr(module, "run", None)):
      raise ValueError(f"harness {harness['name']!r}: its source defines no function `run`")
    if hasattr(module, "prepare"):
      module.prepare(harness["setup"])
    modules.append(module)
  return modules


def _own_the_socket() -> _socket.socket:
  """Moves the socket to the parent away from 0; 0, 1 and 2 become /dev/null, for harnesses and answers."""
  control = _socket.socket(fileno=os.dup(0))
  null = os.open(os.devnull, os.O_RDWR)
  for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
  os.close(null)
  return control


def _receive(control: _socket.socket) -> tuple[int, int] | None:
  """Returns the index of a harness and the channel of the next job; None once the parent has closed the socket."""
  order, beside, *_ = control.recvmsg(ORDER.size, _socket.CMSG_LEN(CHANNEL.size))
  if not order:
    return None
  (channel,) = CHANNEL.unpack(beside[0][2])
  os.set_inheritable(channel, False)  # by what an answer starts
  return ORDER.unpack(order)[0], channel


def _prepare(channel: int) -> Executor | None:
  """Makes what executes jobs of what the channel says, and says there whether that went well; None if not."""
  word = _read_exactly(channel, WORD_BYTES)
  try:
    settings = json.loads(_read_message(channel))
    _limit_all(settings["limits"], isolated=settings["isolated"])
    execute = Executor(settings, _load(settings["harnesses"]))
  except BaseException:
    import traceback

    body = traceback.format_exc().encode(errors="backslashreplace")
    _write_all(channel, word + REPLY.pack(FAILED, len(body)) + body)
    return None
  _write_all(channel, word + REPLY.pack(READY, 0))
  return execute


def main() -> None:
  """Serves the parent until it closes the socket."""
  control = _own_the_socket()
  order = _receive(control)
  if order is None or not (execute := _prepare(order[1])):
    return
  os.close(order[1])
  gc.collect()
  gc.freeze()  # or the first collection in a child would write to, and so copy, every page of objects
  gc.disable()
  control.sendall(bytes([ENDED]))
  while order := _receive(control):
    control.sendall(bytes([execute(*order)]))


if __name__ == "__main__":
  main()
