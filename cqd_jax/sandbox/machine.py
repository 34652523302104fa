"""Machines of their own, by bubblewrap: each is a root file system with users and processes, which may be ruined."""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import platform
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cqd_jax.sandbox import machine_host, machine_root
from cqd_jax.sandbox.isolation import INSTALL, bubblewrap_command, spare_range, system_call_filter
from cqd_jax.sandbox.machine_files import ENVIRONMENT, FILES, FOLDERS, HOSTS_FILES, OWNERS
from cqd_jax.sandbox.machine_host import PACKET_BYTES
from cqd_jax.sandbox.machine_root import PIVOT_ROOT, STAGE, SYSTEM
from cqd_jax.sandbox.pool import start_process
from cqd_jax.sandbox.subordinate import subordinate_count, user_namespace

START_SECONDS = 60.0
PYTHON = "/usr/bin/python3"
Mode = Literal["root", "subordinate", "user"]
"""As the real root; as an ordinary user who was given ids of others (subuid); as one who was not."""


class MachineDied(RuntimeError):
  """A machine is no more; the message says why."""


@dataclasses.dataclass(frozen=True)
class MachineLimits:
  """What one machine may use.

  Attributes:
    command_seconds: from the start of a command to its end; one that takes longer is killed.
    script_seconds: of a script that sets up or checks; some look at every file.
    cpu_seconds: whole seconds of CPU time of each process.
    memory_bytes: of all processes together, and the address space of each.
    disk_bytes: of all files that are written, which are memory too.
    files: how many files may be made.
    processes: processes and threads of all users together.
    output_bytes: of what a command prints; the rest is dropped.

  Raises:
    ValueError: naming the limit, if it is out of range.
  """

  command_seconds: float = 10.0
  script_seconds: float = 60.0
  cpu_seconds: int = 60
  memory_bytes: int = 1 << 30
  disk_bytes: int = 256 << 20
  files: int = 65536
  processes: int = 128
  output_bytes: int = 1 << 20

  def __post_init__(self) -> None:
    lowest = {"command_seconds": 0.1, "script_seconds": 0.1, "memory_bytes": 64 << 20, "disk_bytes": 1 << 20}
    lowest |= {"files": 4096, "processes": 8}
    for field in dataclasses.fields(self):
      value, low = getattr(self, field.name), lowest.get(field.name, 1)
      if not low <= value <= 1 << 48:
        raise ValueError(f"{field.name}: expected {low} <= {field.name} <= 2**48, got {value}")


class Program:
  """A program that runs in a machine.

  Attributes:
    stdin: descriptor of what it reads.
    output: descriptor of what it and its children print, on stdout or stderr.
  """

  def __init__(self, machine: "Machine", number: int, stdin: int, output: int):
    self.machine, self.number = machine, number
    self.stdin, self.output = stdin, output

  @property
  def wakes(self) -> tuple[int, ...]:
    """Descriptors at which its end is heard of."""
    return (self.machine.control.fileno(),)

  def code(self) -> int | None:
    """How it ended; None as long as it has not. Raises MachineDied."""
    return self.machine.code_of(self.number)

  def kill(self) -> None:
    """Ends it and what descends from it."""
    self.machine.kill(self.number)

  def end_input(self) -> None:
    """There is no more for it to read. A second call does nothing."""
    if self.stdin >= 0:
      os.close(self.stdin)
      self.stdin = -1

  def close(self) -> None:
    """Lets go of its descriptors; it may go on."""
    self.end_input()
    os.close(self.output)


class Machine:
  """A machine; not to be shared by threads.

  Nothing of it stays when it is closed, or when this process ends.

  Attributes:
    python: its interpreter, by an absolute path.
  """

  python = PYTHON if os.path.exists(PYTHON) else "/usr/local/bin/python3"

  def __init__(self, mode: Mode, limits: MachineLimits):
    """Starts it.

    Raises:
      MachineDied: with what was said, if it cannot be made.
    """
    self._codes: dict[int, int] = {}
    self._answers: dict[int, str] = {}
    self._dead: str | None = None
    self._ready = False
    self._count = 0
    self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _namespaces(mode) as namespaces:
      with theirs:  # which must be closed for the end of the other side to be heard
        self._process = start_process(
          _command(mode, namespaces),
          stdin=theirs,
          stdout=subprocess.DEVNULL,
          stderr=subprocess.PIPE,
          env={},
          cwd="/",
          start_new_session=True,
          pass_fds=namespaces,
        )
      self._wait_until_ready(mode, limits)

  def _wait_until_ready(self, mode: Mode, limits: MachineLimits) -> None:
    try:
      self._send(_settings(mode, limits))
      self._hear_until(lambda: self._ready, START_SECONDS)
    except BaseException:
      self.close()
      raise

  def spawn(self, argv: Sequence[str], *, apart: bool = False) -> Program:
    """Starts a program as the machine's root, in its /.

    Args:
      argv: the program's path, and its arguments.
      apart: so that other programs of the machine can at most kill it, not write to its memory.

    Raises:
      MachineDied: if it is dead.
      OSError: if the arguments are too long.
    """
    self._count += 1
    (reads, stdin), (output, writes) = os.pipe(), os.pipe()
    try:
      self._send({"spawn": self._count, "argv": list(argv), "env": ENVIRONMENT, "apart": apart}, reads, writes)
    except BaseException:
      os.close(stdin)
      os.close(output)
      raise
    finally:
      os.close(reads)
      os.close(writes)
    return Program(self, self._count, stdin, output)

  def code_of(self, number: int) -> int | None:
    """How a program ended, if it has. Raises MachineDied."""
    self._hear()
    return self._codes.get(number)

  def kill(self, number: int) -> None:
    """Ends a program and what descends from it. Raises MachineDied."""
    if number not in self._codes:
      self._send({"kill": number})

  def settle(self) -> None:
    """Says that it is set up: until now its /dev/random and /dev/urandom began alike each time. Raises MachineDied."""
    self._ask("settle")

  def changed(self) -> str:
    """The path of a file that checks are carried out by and that was changed; "" if there is none."""
    return self._ask("inspect")

  def abort(self) -> None:
    """Kills it, while another thread may be using it; it has to be closed nonetheless."""
    self._process.kill()

  def close(self) -> None:
    """Ends it and all that runs in it. A second call does nothing."""
    self.control.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=2.0)
    self._process.kill()
    self._process.wait()
    if self._process.stderr:
      self._process.stderr.close()

  def _ask(self, what: str) -> str:
    """What the machine says to a question."""
    self._count += 1
    number = self._count
    self._send({what: number})
    self._hear_until(lambda: number in self._answers, START_SECONDS)
    return self._answers.pop(number)

  def _send(self, message: Mapping[str, Any], *descriptors: int) -> None:
    self._hear()
    try:
      socket.send_fds(self.control, [json.dumps(message).encode()], descriptors)
    except (BrokenPipeError, ConnectionResetError) as error:
      raise MachineDied(self._last_words()) from error

  def _hear(self, seconds: float = 0.0) -> None:
    """Takes in what the machine says, waiting for it to begin."""
    if self._dead:
      raise MachineDied(self._dead)
    poll = select.poll()
    poll.register(self.control, select.POLLIN)
    while poll.poll(seconds * 1000):
      seconds = 0.0
      try:
        packet = self.control.recv(PACKET_BYTES)
      except ConnectionResetError:
        packet = b""
      self._note(json.loads(packet) if packet else {"dead": self._last_words()})

  def _note(self, message: Mapping[str, Any]) -> None:
    if "ended" in message:
      self._codes[message["ended"]] = message["code"]
    elif "answered" in message:
      self._answers[message["answered"]] = message["text"]
    elif "dead" in message:
      self._dead = message["dead"]
      raise MachineDied(self._dead)
    else:
      self._ready = True

  def _hear_until(self, done: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
      if (left := deadline - time.monotonic()) <= 0:
        raise MachineDied(f"the machine said nothing for {seconds:g} s")
      self._hear(left)

  def _last_words(self) -> str:
    self._process.kill()
    said = self._process.communicate()[1].decode(errors="replace").strip()
    return said or f"the machine ended with code {self._process.returncode}"


@contextlib.contextmanager
def _namespaces(mode: Mode) -> Iterator[tuple[int, ...]]:
  """Descriptors of what has to be made before bubblewrap, as long as it takes to start."""
  if mode != "subordinate":
    yield ()
    return
  with contextlib.ExitStack() as stack:
    try:
      namespace = stack.enter_context(user_namespace())
    except OSError as error:
      raise MachineDied(str(error)) from error
    yield (namespace,)


def _command(mode: Mode, namespaces: Sequence[int]) -> list[str]:
  further = [word for namespace in namespaces for word in ("--userns", str(namespace))]
  further += ["--proc", "/proc", "--dir", STAGE, "--dev-bind", "/dev/full", "/dev/full"]
  module = "/package/" + machine_root.__name__.replace(".", "/") + ".py"
  further += ["--ro-bind", str(Path(machine_root.__file__)), module, "--setenv", "PYTHONPATH", "/package"]
  further += [word for file in HOSTS_FILES for word in ("--ro-bind-try", file, file)]
  return bubblewrap_command(Path(machine_host.__file__), own_user_namespace=mode == "user", further=further)


def _settings(mode: Mode, limits: MachineLimits) -> dict[str, Any]:
  base: int | None = None
  count = 1
  if mode == "root":
    base, count = spare_range(Path("/proc/self/uid_map").read_text()) or (None, 1)
  elif mode == "subordinate":
    base, count = 1, subordinate_count()
  return {
    "limits": dataclasses.asdict(limits),
    "base": base,
    "count": count,
    "beneath": mode != "root",
    "closed": [] if mode == "root" else _closed_folders(),
    "beside": 0 if base else 4,  # bubblewrap and the program that makes the machine are the same user
    "seccomp": system_call_filter(platform.machine(), own_system=True).hex(),
    "env": ENVIRONMENT,
    "folders": FOLDERS,
    "files": FILES,
    "owners": OWNERS,
  }


@functools.cache
def _closed_folders() -> list[str]:
  """The folders of the system that this user cannot look into, nor would the machine's root, who is used to."""
  closed: list[str] = []

  def note(error: OSError) -> None:
    if isinstance(error, PermissionError):
      closed.append(str(error.filename))

  for name in SYSTEM:
    if not Path("/", name).is_symlink():
      collections.deque(os.walk(f"/{name}", onerror=note), maxlen=0)
  return closed


@functools.cache
def find_mode() -> tuple[Mode | None, str]:
  """The first way to make a machine that works here; the reason why there is none, else "".

  It makes one, and remembers the result for the life of the process.
  """
  if shutil.which("bwrap") is None:
    return None, f"bubblewrap is not installed ({INSTALL})"
  if platform.machine() not in PIVOT_ROOT:
    return None, f"no filter of system calls is known for {platform.machine()}"
  reasons = ["the caller is root, and there are no user ids that belong to nobody"] if os.geteuid() == 0 else []
  for mode in _possible_modes():
    try:
      with contextlib.closing(Machine(mode, MachineLimits())) as machine:
        program = machine.spawn(["/bin/bash", "-c", "exit 7"])
        with contextlib.closing(program):
          machine._hear_until(lambda program=program: program.code() is not None, START_SECONDS)
          if program.code() == 7:
            return mode, ""
          reasons = [os.read(program.output, 500).decode(errors="replace")]
    except (OSError, RuntimeError) as error:
      reasons = [f"{error}"[-500:]]
  return None, f"bubblewrap is installed but cannot be used: {'; '.join(reasons)}"


def _possible_modes() -> Iterator[Mode]:
  if os.geteuid() != 0:
    if subordinate_count():
      yield "subordinate"
    yield "user"
  elif spare_range(Path("/proc/self/uid_map").read_text()) is not None:
    yield "root"  # and never as the real root itself, whose processes nothing counts
