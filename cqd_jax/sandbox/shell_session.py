"""A shell that keeps its state from command to command, and scripts that stand alone, in any kind of machine."""

import contextlib
import os
import select
import shlex
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

SHELL = ("/bin/bash", "--login")
"""Not an interactive one: that would read ahead, and leave nothing to a program that takes over its input (su)."""

SEED = 2023
"""Of $RANDOM, so that a machine that is made again is the same."""

TICK_SECONDS = 0.05


@runtime_checkable
class Running(Protocol):
  """A program that runs in a machine; see `cqd_jax.sandbox.machine.Program`."""

  stdin: int
  output: int

  @property
  def wakes(self) -> tuple[int, ...]:
    """Descriptors at which its end is heard of."""

  def code(self) -> int | None:
    """How it ended; None as long as it has not."""

  def kill(self) -> None:
    """Ends it and what descends from it."""

  def end_input(self) -> None:
    """There is no more for it to read."""

  def close(self) -> None:
    """Lets go of its descriptors."""


Spawn = Callable[[Sequence[str]], Running]
"""What starts a program in a machine."""


class Said(NamedTuple):
  """What came of a command: what it printed, and whether it had to be ended because it took too long."""

  output: str
  late: bool


class Done(NamedTuple):
  """What came of a script: its exit code, None if it took too long, and what it printed."""

  code: int | None
  output: str


class Session:
  """A login shell. One that ends, or is ended with a command that takes too long, is followed by a new one."""

  def __init__(self, spawn: Spawn, seconds: float, output_bytes: int):
    self._spawn, self._seconds, self._output_bytes = spawn, seconds, output_bytes
    self._shell: Running | None = None

  def run(self, code: str) -> Said:
    """Executes commands as if they had been typed into the shell."""
    if self._shell is None:
      self._shell = self._spawn(SHELL)
      said = self._type(self._shell, f"shopt -s expand_aliases; RANDOM={SEED}")
      if self._shell is None:  # what is typed next is not to be believed to be executed
        return said
    return self._type(self._shell, code)

  def close(self) -> None:
    """Ends the shell."""
    if self._shell:
      with contextlib.suppress(RuntimeError, OSError):  # it may be gone with its machine
        self._shell.kill()
      self._shell.close()
      self._shell = None

  def _type(self, shell: Running, code: str) -> Said:
    """Types commands into a shell, and after them one that prints a word that says they are done.

    In one `eval`, the commands are all read before the first is executed, even if they are no correct bash. A program
    that takes over the shell's input (su) takes the word's command too and executes it, as is meant.
    """
    word = os.urandom(8).hex()
    sign = f"printf '\\n%s%s\\n' {word[:8]} {word[8:]}\n"
    text = f"eval {shlex.quote(code)}\n{sign}".encode(errors="replace")
    got, ended = _exchange(shell, text, f"\n{word}\n".encode(), self._seconds)
    found = got.find(f"\n{word}\n".encode())
    if found < 0:
      self.close()
      got = got.replace(sign.encode(), b"")  # from a program that read what was not for it
    return Said(_text(got[: found if found >= 0 else None], self._output_bytes), late=found < 0 and not ended)


def run_script(spawn: Spawn, argv: Sequence[str], seconds: float, output_bytes: int) -> Done:
  """Executes a program to its end; what it started in the background goes on."""
  try:
    program = spawn(argv)
  except (OSError, ValueError) as error:  # arguments that are too long, or hold a zero
    return Done(126, str(error))
  with contextlib.closing(program):
    program.end_input()
    got, ended = _exchange(program, b"", None, seconds)
    return Done(program.code() if ended else None, _text(got, output_bytes))


def _text(got: bytes, most: int) -> str:
  return got[:most].decode(errors="replace").replace("\r\n", "\n")


def _exchange(program: Running, text: bytes, until: bytes | None, seconds: float) -> tuple[bytes, bool]:
  """Writes `text` and reads until `until` is read, or the program has ended, or is killed for taking too long.

  Returns:
    What was read, and whether the program has ended by itself.
  """
  deadline = time.monotonic() + seconds
  got, unsent, is_open = bytearray(), memoryview(text), True
  os.set_blocking(program.output, False)
  if text:
    os.set_blocking(program.stdin, False)
  while True:
    code = program.code()
    is_open = _read(program, got, is_open)
    if until is not None and until in got[-len(until) - _CHUNK :]:
      return bytes(got), False
    if code is not None:
      _read(program, got, is_open)
      return bytes(got), True
    if time.monotonic() > deadline:
      program.kill()
      return bytes(got), False
    unsent = _write(program, unsent)
    poll = select.poll()
    for wake in program.wakes:
      poll.register(wake, select.POLLIN)
    if is_open:
      poll.register(program.output, select.POLLIN)
    if unsent:
      poll.register(program.stdin, select.POLLOUT)
    poll.poll(TICK_SECONDS * 1000)


_CHUNK = 1 << 16
_MOST = 16 << 20


def _read(program: Running, got: bytearray, is_open: bool) -> bool:
  """Reads what there is, as far as a machine is patient; False at the end."""
  with contextlib.suppress(BlockingIOError):
    for _ in range(16 if is_open else 0):
      chunk = os.read(program.output, _CHUNK)
      if not chunk:
        return False
      got += chunk
      if len(got) > _MOST:  # of what floods us, the end is enough to find the word there
        del got[_MOST // 2 : -2 * _CHUNK]
  return is_open


def _write(program: Running, unsent: memoryview) -> memoryview:
  try:
    return unsent[os.write(program.stdin, unsent) :] if unsent else unsent
  except BlockingIOError:
    return unsent
  except BrokenPipeError:
    return memoryview(b"")
