"""Sandbox and services that are there when they are needed: tasks that execute nothing never start one."""

import collections
import contextlib
import dataclasses
import json
import threading
from collections.abc import Sequence

from cqd_jax.sandbox.sandbox import JobRunner, Limits, Sandbox, worker_count
from cqd_jax.tasks.execution import Execute, Harness, Job, Outcome, Service


class SandboxOnDemand(JobRunner):
  """A `Sandbox` and services, each of which starts with its first jobs; an `Execute` that is a context manager.

  Threads may share it.

  Attributes:
    isolated: as of `Sandbox`; None before it has started.
  """

  def __init__(
    self,
    harnesses: Sequence[Harness | Service],
    *,
    workers: int | None = None,
    unsafe: bool = False,
    limits: Limits | None = None,
  ):
    """Starts nothing.

    Args:
      harnesses: as of `Sandbox`, and services; several tasks may bring the same.
      workers: as of `Sandbox`.
      unsafe: as of `Sandbox`.
      limits: as of `Sandbox`.

    Raises:
      ValueError: naming the harness, if two of one name differ; if an argument is out of range.
    """
    distinct = distinct_harnesses(harnesses)
    self._harnesses = [each for each in distinct if isinstance(each, Harness)]
    self._services = {each.name: each for each in distinct if isinstance(each, Service)}
    self._workers = worker_count(workers)
    self._unsafe, self._limits = unsafe, limits
    self._sandbox: Sandbox | None = None
    self._opened = dict[str, Execute]()
    self._to_close = contextlib.ExitStack()
    self._closed = False
    self._lock = threading.Lock()

  @property
  def isolated(self) -> bool | None:
    """Whether jobs are isolated; None before the first."""
    return None if self._sandbox is None else self._sandbox.isolated

  def run(self, jobs: Sequence[Job]) -> list[Outcome]:
    """As `Sandbox.run`. The first jobs of each kind start what executes them; no jobs start nothing.

    Raises:
      SandboxUnavailable: if nothing isolates and `unsafe` is False; it is tried again with the next jobs.
      ValueError: as of `Sandbox.run`; if a service gives too few or too many outcomes.
      RuntimeError: as of `Sandbox` and of `Sandbox.run`.
    """
    with self._lock:
      if self._closed:
        raise RuntimeError("run: the sandbox is closed")
      places = self._divide(jobs)
      executes = {name: self._open(name) for name in places}
    outcomes: dict[int, Outcome] = {}
    for name, own in places.items():
      given = executes[name]([jobs[place] for place in own])
      if len(given) != len(own):
        raise ValueError(f"{name}: expected {len(own)} outcomes, got {len(given)}")
      outcomes.update(zip(own, given, strict=True))
    return [outcomes[place] for place in range(len(jobs))]

  def close(self) -> None:
    """Ends what was started; it cannot be used after it. A second call does nothing."""
    with self._lock:
      self._closed = True
      to_close = self._to_close.pop_all()
    to_close.close()

  def _divide(self, jobs: Sequence[Job]) -> dict[str, list[int]]:
    """Which jobs go where: by the name of a service, all others to the sandbox, whose name is empty."""
    known = [*(harness.name for harness in self._harnesses), *self._services]
    places: dict[str, list[int]] = collections.defaultdict(list)
    for index, job in enumerate(jobs):
      if job.harness not in known:
        raise ValueError(f"jobs[{index}].harness: expected one of {known}, got {job.harness!r}")
      places[job.harness if job.harness in self._services else ""].append(index)
    return places

  def _open(self, name: str) -> Execute:
    if name:
      if name not in self._opened:
        service = self._services[name].start(self._workers, self._unsafe)
        self._opened[name] = self._to_close.enter_context(service)
      return self._opened[name]
    if self._sandbox is None:
      sandbox = Sandbox(self._harnesses, limits=self._limits, workers=self._workers, unsafe=self._unsafe)
      self._to_close.callback(sandbox.close)
      self._sandbox = sandbox
    return self._sandbox.run


def distinct_harnesses(harnesses: Sequence[Harness | Service]) -> list[Harness | Service]:
  """Each harness or service once, in the order in which they first come.

  Raises:
    ValueError: naming the harness, if two of one name differ.
  """
  distinct: dict[str, Harness | Service] = {}
  for harness in harnesses:
    known = distinct.setdefault(harness.name, harness)
    if _content(known) != _content(harness):
      raise ValueError(f"harnesses: expected one of each name, got two that differ named {harness.name!r}")
  return list(distinct.values())


def _content(harness: Harness | Service) -> str:
  """As text, since to Python 1, 1.0 and True are equal."""
  if isinstance(harness, Service):
    return f"service {harness.fingerprint}"
  return json.dumps(dataclasses.asdict(harness))
