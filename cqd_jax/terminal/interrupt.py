"""Ctrl-C and the end of a lease (SIGTERM): the first asks to stop at the next safe point, the second stops at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Stopped(Exception):
  """Work was ended at a safe point because somebody asked for it; the message says how to go on."""


class Interrupt:
  """Whether somebody asked to stop.

  Attributes:
    requested: True from the first signal on.
  """

  def __init__(self) -> None:
    self.requested = False

  def check(self) -> None:
    """Raises `Stopped` if somebody asked to stop; to be called where nothing would be lost."""
    if self.requested:
      raise Stopped("stopped")


@contextlib.contextmanager
def interruptible(announce: Callable[[str], None]) -> Iterator[Interrupt]:
  """Within the block the first SIGINT or SIGTERM sets `requested`, and the second raises `KeyboardInterrupt`.

  Elsewhere than in the main thread, where Python takes no signals, the block runs as it would without.

  Args:
    announce: called with what is going to happen after the first signal.
  """
  interrupt = Interrupt()
  if threading.current_thread() is not threading.main_thread():
    yield interrupt
    return

  def on_signal(number: int, frame: FrameType | None) -> None:
    del number, frame
    if interrupt.requested:
      raise KeyboardInterrupt
    interrupt.requested = True
    announce("stopping at the next safe point, in a few seconds; once more to stop at once")

  before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield interrupt
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
