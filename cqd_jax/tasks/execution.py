"""What a task asks to have executed, and what comes back: the meeting point of tasks and sandboxes."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

JSON: TypeAlias = Any
"""None, bool, int, float, str, and lists and dicts (with str keys) of these."""

Status: TypeAlias = Literal["ok", "error", "timeout", "killed", "overflow"]

MOST_CPU_SECONDS = 3600
"""An answer that takes longer than this is not worth waiting for."""


@dataclasses.dataclass(frozen=True)
class Harness:
  """Trusted code of a task that executes one untrusted answer inside the sandbox.

  Attributes:
    name: unique name, by which jobs refer to the harness.
    source: Python source that uses only the standard library and defines `run(payload) -> JSON`. It may define
      `prepare(setup)`, called once in each worker before any answer; what it leaves in module globals is inherited
      by every job as its own copy. Import all that `run` needs at the top: it is then paid for once. It may define
      `furnish()`, called in an empty folder: every job begins in a folder that holds what it wrote, and that is
      written again only after a job that changed something.
    setup: JSON given to `prepare`.
    cpu_seconds: whole seconds of CPU time for each of its jobs; None: as many as the sandbox allows any job. Where that
      is fewer, the job's wall time grows by the difference.

  Raises:
    ValueError: if `cpu_seconds` is out of range.
  """

  name: str
  source: str
  setup: JSON = None
  cpu_seconds: int | None = None

  def __post_init__(self) -> None:
    if self.cpu_seconds is not None and not 1 <= self.cpu_seconds <= MOST_CPU_SECONDS:
      raise ValueError(f"cpu_seconds: expected 1 to {MOST_CPU_SECONDS}, got {self.cpu_seconds}")


@dataclasses.dataclass(frozen=True)
class Job:
  """One answer to execute: `payload` (JSON) goes to `run` of the harness, or to the service, named `harness`."""

  harness: str
  payload: JSON


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What executing a job gave. Verdicts are formed from it outside the sandbox, never inside.

  Attributes:
    status: "ok": `run` returned; "error": it raised, or returned no JSON; "timeout": over the limit of wall or CPU
      time; "killed": the process died without a result (memory, a signal, an early exit); "overflow": the result was
      larger than allowed.
    value: what `run` returned, where status is "ok"; else None. Untrusted data of JSON's types.
    detail: a line for a person on what went wrong, else "".
  """

  status: Status
  value: JSON = None
  detail: str = ""


Execute: TypeAlias = Callable[[Sequence[Job]], list[Outcome]]
"""Executes jobs, each isolated from the others; outcomes in the order of the jobs."""


@dataclasses.dataclass(frozen=True)
class Service:
  """What executes jobs that no harness can: a database server, machines of their own.

  Attributes:
    name: unique name, by which jobs refer to the service.
    fingerprint: all that an outcome depends on beside the job: settings, and the version of what is started.
    start: `(workers, unsafe)` to what executes jobs, `workers` of them at a time. It is opened with the first job and
      closed with the run. It never raises for what an answer did: that is an outcome. `unsafe` says that the user
      agreed to execute answers where nothing isolates.
  """

  name: str
  fingerprint: str
  start: Callable[[int, bool], AbstractContextManager[Execute]] = dataclasses.field(compare=False)


def execute_distinct(jobs: Sequence[Job], execute: Execute) -> list[Outcome]:
  """The outcomes of jobs, each distinct one executed once.

  Raises:
    ValueError: if `execute` gives too few or too many outcomes.
  """
  distinct: dict[tuple[str, str], int] = {}
  # by its text, because payloads need not be hashable, and 1, 1.0 and True are different payloads
  places = [distinct.setdefault((job.harness, json.dumps(job.payload)), len(distinct)) for job in jobs]
  fresh: list[Job] = []
  for job, place in zip(jobs, places, strict=True):
    if place == len(fresh):
      fresh.append(job)
  outcomes = execute(fresh) if fresh else []
  if len(outcomes) != len(fresh):
    raise ValueError(f"execute: expected {len(fresh)} outcomes, got {len(outcomes)}")
  return [outcomes[place] for place in places]
