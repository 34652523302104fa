"""Progress with time left: a bar on a terminal, plain lines elsewhere."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance: TypeAlias = Callable[..., None]
"""`advance(steps=1, note="")`: so much more is done; the note is shown beside the bar."""

SECONDS_BETWEEN_LINES = 10.0

MEGABYTE = 1_000_000


@contextlib.contextmanager
def progress(console: Console, description: str, total: int, *, done: int = 0) -> Iterator[Advance]:
  """Shows how far `total` steps have come while the block runs; yields the function that advances it.

  Args:
    console: where to.
    description: of what is done.
    total: steps in all.
    done: steps of them that were done before; they do not count for the time left.
  """
  show = _bar if console.is_terminal else _lines
  with show(console, description, total, done) as advance:
    yield advance


@contextlib.contextmanager
def megabytes(console: Console, description: str, num_bytes: int) -> Iterator[Advance]:
  """As `progress`, for bytes, of which megabytes are shown; it may be advanced from any thread."""
  total = max(1, num_bytes // MEGABYTE)
  with progress(console, description, total) as show:
    done = 0
    one_at_a_time = threading.Lock()

    def advance(size: int = 1, note: str = "") -> None:
      nonlocal done
      with one_at_a_time:
        before, done = done, done + size
        if steps := done * total // num_bytes - before * total // num_bytes:
          show(steps, note=note)

    yield advance


@contextlib.contextmanager
def _bar(console: Console, description: str, total: int, before: int) -> Iterator[Advance]:
  columns = (
    TextColumn("{task.description:<28}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
  )
  with Progress(*columns, console=console) as bar:
    row = bar.add_task(description, total=total, completed=before, note="")

    def advance(steps: int = 1, note: str = "") -> None:
      bar.update(row, advance=steps, note=note)

    yield advance


@contextlib.contextmanager
def _lines(console: Console, description: str, total: int, before: int) -> Iterator[Advance]:
  start = last = time.monotonic()
  done = before

  def advance(steps: int = 1, note: str = "") -> None:
    nonlocal done, last
    done += steps
    now = time.monotonic()
    if done >= total or now - last >= SECONDS_BETWEEN_LINES:
      last = now
      left = (now - start) / max(done - before, 1) * max(total - done, 0)
      console.print(
        f"{description}: {done}/{total}, {now - start:.0f} s, {left:.0f} s left {note}".rstrip(), highlight=False
      )

  yield advance
