"""A sandbox that is there when it is needed: tasks that execute nothing never start one."""

import dataclasses
import json
import threading
from collections.abc import Sequence

from cqd_jax.sandbox.sandbox import JobRunner, Limits, Sandbox, worker_count
from cqd_jax.tasks.execution import Harness, Job, Outcome


class SandboxOnDemand(JobRunner):
  """A `Sandbox` that starts with the first jobs; an `Execute` that is a context manager. Threads may share it.

  Attributes:
    isolated: as of `Sandbox`; None before it has started.
  """

  def __init__(
    self,
    harnesses: Sequence[Harness],
    *,
    workers: int | None = None,
    unsafe: bool = False,
    limits: Limits | None = None,
  ):
    """Starts nothing.

    Args:
      harnesses: as of `Sandbox`; several tasks may bring the same.
      workers: as of `Sandbox`.
      unsafe: as of `Sandbox`.
      limits: as of `Sandbox`.

    Raises:
      ValueError: naming the harness, if two of one name differ; if an argument is out of range.
    """
    self._harnesses = distinct_harnesses(harnesses)
    self._workers = worker_count(workers)
    self._unsafe, self._limits = unsafe, limits
    self._sandbox: Sandbox | None = None
    self._closed = False
    self._lock = threading.Lock()

  @property
  def isolated(self) -> bool | None:
    """Whether jobs are isolated; None before the first."""
    return None if self._sandbox is None else self._sandbox.isolated

  def run(self, jobs: Sequence[Job]) -> list[Outcome]:
    """As `Sandbox.run`. The first jobs start the sandbox; no jobs start nothing.

    Raises:
      SandboxUnavailable: if nothing isolates and `unsafe` is False; it is tried again with the next jobs.
      ValueError: as of `Sandbox.run`.
      RuntimeError: as of `Sandbox` and of `Sandbox.run`.
    """
    with self._lock:
      if self._closed:
        raise RuntimeError("run: the sandbox is closed")
      if not jobs:
        return []
      if self._sandbox is None:
        self._sandbox = Sandbox(self._harnesses, limits=self._limits, workers=self._workers, unsafe=self._unsafe)
      sandbox = self._sandbox
    return sandbox.run(jobs)

  def close(self) -> None:
    """Ends the sandbox, if it was started; it cannot be used after it. A second call does nothing."""
    with self._lock:
      self._closed = True
      sandbox = self._sandbox
    if sandbox is not None:
      sandbox.close()


def distinct_harnesses(harnesses: Sequence[Harness]) -> list[Harness]:
  """Each harness once, in the order in which they first come.

  Raises:
    ValueError: naming the harness, if two of one name differ.
  """
  distinct: dict[str, Harness] = {}
  for harness in harnesses:
    known = distinct.setdefault(harness.name, harness)
    if _content(known) != _content(harness):
      raise ValueError(f"harnesses: expected one of each name, got two that differ named {harness.name!r}")
  return list(distinct.values())


def _content(harness: Harness) -> str:
  """As text, since to Python 1, 1.0 and True are equal."""
  return json.dumps(dataclasses.asdict(harness))
