"""Executes untrusted answers, shut in by bubblewrap; says so and refuses where nothing isolates."""

import abc
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cqd_jax.sandbox import private_tmp
from cqd_jax.sandbox import worker as worker_program
from cqd_jax.sandbox.isolation import (
  INSTALL,
  PYTHON_FLAGS,
  bubblewrap_command,
  interpreter,
  spare_uid,
  system_call_filter,
)
from cqd_jax.sandbox.pool import Dispatch, Reply, Worker
from cqd_jax.sandbox.worker import JOB, find_non_json
from cqd_jax.tasks.execution import JSON, Harness, Job, Outcome, Status

PATIENCE_SECONDS = 15.0
"""A worker may be silent for this much longer than a job's wall time before it is given up."""

REMEMBERED_BYTES = 64 << 20
REMEMBERED_OVERHEAD = 256

_STATUSES: dict[int, Status] = {
  worker_program.OK: "ok",
  worker_program.ERROR: "error",
  worker_program.TIMEOUT: "timeout",
  worker_program.KILLED: "killed",
  worker_program.OVERFLOW: "overflow",
}


class SandboxUnavailable(RuntimeError):
  """Nothing on this machine isolates; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one job may use.

  The worst case for memory, a worker: `processes` * `memory_bytes` + `tmp_bytes`, since the kernel limits the
  address space of each process; where the machine's memory ends before that, it ends an answer, not the caller.

  Attributes:
    wall_seconds: seconds from the start of the job's process to its result. Generous, so that a hiccup of the machine
      fails no answer; what loops is ended by the CPU limit before.
    cpu_seconds: whole seconds of CPU time of each process.
    memory_bytes: address space of each process, at least 64 MiB: the interpreter's own is within.
    file_bytes: size of any one file.
    tmp_bytes: size of all files in /tmp, which are memory.
    processes: processes and threads at a time, the job's own first one included.
    result_bytes: length of the result as JSON.
    open_files: open file descriptors of each process, at least 16.

  Raises:
    ValueError: naming the limit, if it is out of range.
  """

  wall_seconds: float = 5.0
  cpu_seconds: int = 2
  memory_bytes: int = 512 << 20
  file_bytes: int = 16 << 20
  tmp_bytes: int = 64 << 20
  processes: int = 16
  result_bytes: int = 1 << 20
  open_files: int = 64

  def __post_init__(self) -> None:
    lowest = {"wall_seconds": 0.01, "memory_bytes": 64 << 20, "tmp_bytes": 4096, "open_files": 16}
    for field in dataclasses.fields(self):
      value, low = getattr(self, field.name), lowest.get(field.name, 1)
      if type(value) is not int and (field.type is int or type(value) is not float):
        raise ValueError(f"{field.name}: expected a number ({field.type}), got {value!r}")
      if not low <= value <= 1 << 48:
        raise ValueError(f"{field.name}: expected {low} <= {field.name} <= 2**48, got {value}")


Runner = TypeVar("Runner", bound="JobRunner")


class JobRunner(abc.ABC):
  """What executes jobs until it is closed: a context manager and an `Execute`."""

  def __enter__(self: Runner) -> Runner:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()

  def __call__(self, jobs: Sequence[Job]) -> list[Outcome]:
    """As `run`."""
    return self.run(jobs)

  @abc.abstractmethod
  def run(self, jobs: Sequence[Job]) -> list[Outcome]:
    """Executes the jobs; returns their outcomes in the same order."""

  @abc.abstractmethod
  def close(self) -> None:
    """Ends what was started; it cannot be used after it. A second call does nothing."""


class Sandbox(JobRunner):
  """Executes jobs in isolation, several at a time; an `Execute` that is a context manager.

  A worker takes many jobs, each in a process of its own with its own namespaces, /tmp and limits: no network, a
  read-only system, no capabilities, a user that owns nothing. A job sees nothing of another. Identical jobs are
  executed once, within a call and across calls (the last 64 MiB of results are remembered), so a harness must be
  deterministic. Module `random` is seeded alike for every job if a harness imports it; stdout and stderr go nowhere.

  A result is data of an untrusted program: an answer may claim any value. Hence compare it outside with what was
  expected, and put nothing that was expected into payload or setup.

  Attributes:
    isolated: False if `unsafe` was asked for and nothing isolates.
  """

  def __init__(
    self,
    harnesses: Sequence[Harness],
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    unsafe: bool = False,
  ):
    """Starts the workers.

    Args:
      harnesses: trusted code that executes the answers; names are unique.
      limits: of each job; the defaults of `Limits` if None.
      workers: how many jobs are executed at a time; as many as there are usable CPUs if None.
      unsafe: where nothing isolates, execute nonetheless, with limits only: an answer can then read and write
        whatever the caller can. Where something isolates, it is used.

    Raises:
      ValueError: if an argument is out of range, or a name is not unique.
      SandboxUnavailable: if nothing isolates and `unsafe` is False.
      RuntimeError: with the traceback, if a harness does not compile, defines no `run`, or fails in `prepare`.
    """
    self._indices = {harness.name: index for index, harness in enumerate(harnesses)}
    if len(self._indices) != len(harnesses):
      raise ValueError(f"harnesses: expected unique names, got {[harness.name for harness in harnesses]}")
    count = worker_count(workers)
    mode, reason = _find_mode()
    if mode == "none" and not unsafe:
      raise SandboxUnavailable(f"{reason} (To execute answers WITHOUT isolation: --unsafe.)")
    self.isolated = mode != "none"
    self._mode, self._limits = mode, limits or Limits()
    self._harnesses = [dataclasses.asdict(harness) for harness in harnesses]
    self._count, self._workers, self._closed = count, list[Worker](), False
    self._remembered, self._remembered_bytes = dict[bytes, Reply](), 0
    self._lock = threading.Lock()
    self._start_workers()

  def run(self, jobs: Sequence[Job]) -> list[Outcome]:
    """Executes the jobs; returns their outcomes in the same order. Threads that call it take turns.

    Raises:
      ValueError: naming the job whose harness is unknown or whose payload is no JSON; nothing is then executed.
      RuntimeError: if the sandbox is closed, or a worker died and none can be started in its place.
    """
    messages = [self._encode(index, job) for index, job in enumerate(jobs)]
    keys = [hashlib.blake2b(message, digest_size=16).digest() for message in messages]
    with self._lock:
      if self._closed:
        raise RuntimeError("run: the sandbox is closed")
      replies = {key: self._remembered[key] for key in keys if key in self._remembered}
      fresh = {key: message for key, message in zip(keys, messages, strict=True) if key not in replies}
      replies |= zip(fresh, self._execute(list(fresh.values())), strict=True)
      self._remember({key: replies[key] for key in fresh})
    return [_outcome(replies[key]) for key in keys]

  def close(self) -> None:
    """Ends the workers; the sandbox cannot be used after it. A second call does nothing."""
    with self._lock:
      self._closed = True
      self._end_workers()

  def _encode(self, index: int, job: Job) -> bytes:
    if job.harness not in self._indices:
      raise ValueError(f"jobs[{index}].harness: expected one of {list(self._indices)}, got {job.harness!r}")
    if reason := find_non_json(job.payload):
      raise ValueError(f"jobs[{index}].payload: expected JSON; {reason}")
    try:
      content = json.dumps(job.payload, check_circular=False).encode()
    except ValueError as error:  # an integer of too many digits
      raise ValueError(f"jobs[{index}].payload: expected JSON; {error}") from error
    return JOB.pack(self._indices[job.harness], len(content)) + content

  def _execute(self, messages: list[bytes]) -> list[Reply]:
    if not messages:
      return []
    try:
      if not self._workers:
        self._start_workers()
      longest = max(times["wall_seconds"] for times in _times(self._harnesses, self._limits))
      patience = longest + PATIENCE_SECONDS
      return Dispatch(messages, self._workers, self._start_one, patience).run()
    except BaseException:
      self._end_workers()  # or replies to these jobs would be taken for those to the next
      raise

  def _remember(self, replies: Mapping[bytes, Reply]) -> None:
    for key, reply in replies.items():
      if reply.status == worker_program.KILLED:
        continue  # the machine's doing, perhaps
      self._remembered[key] = reply
      self._remembered_bytes += len(reply.body) + REMEMBERED_OVERHEAD
    while self._remembered_bytes > REMEMBERED_BYTES:
      oldest = self._remembered.pop(next(iter(self._remembered)))
      self._remembered_bytes -= len(oldest.body) + REMEMBERED_OVERHEAD

  def _start_workers(self) -> None:
    try:
      for _ in range(self._count):
        self._workers.append(_start(self._mode, self._harnesses, self._limits))
      for worker in self._workers:
        worker.wait_until_ready()
    except BaseException:
      self._end_workers()
      raise

  def _start_one(self) -> Worker:
    worker = _start(self._mode, self._harnesses, self._limits)
    worker.wait_until_ready()
    return worker

  def _end_workers(self) -> None:
    while self._workers:
      self._workers.pop().close()


def installed() -> bool:
  """Whether the program that isolates is there; whether it works, `probe` tries out."""
  return shutil.which("bwrap") is not None


def usable_cpus() -> int:
  """How many CPUs this process may use, which is fewer than there are where it is bound to some."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(workers: int | None) -> int:
  """How many workers to start; None: one for each usable CPU.

  Raises:
    ValueError: if that is none.
  """
  if workers is not None and workers < 1:
    raise ValueError(f"workers: expected workers >= 1, got {workers}")
  return usable_cpus() if workers is None else workers


def probe() -> str | None:
  """Returns why nothing on this machine isolates, in a sentence or two for a person; None where isolation works.

  It starts a worker, executes a job in it and remembers the result for the life of the process.
  """
  return _find_mode()[1]


def _outcome(reply: Reply) -> Outcome:
  status, body = _STATUSES[reply.status], reply.body
  if status != "ok":
    return Outcome(status, detail=body.decode(errors="backslashreplace"))
  try:
    return Outcome("ok", _decode(body))
  except (ValueError, RecursionError) as error:
    return Outcome("error", detail=f"returned no JSON: {error}")


def _decode(body: bytes) -> JSON:
  """Reads JSON that may be made to harm: stricter than `json.loads` on depth, NaN and lone surrogates."""
  value = json.loads(body.decode("ascii"), parse_constant=_refuse_constant)
  if b"\\u" in body:
    json.dumps(value, ensure_ascii=False).encode()
  if reason := find_non_json(value):
    raise ValueError(reason)
  return value


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} in it")


def _start(mode: str, harnesses: Sequence[Mapping[str, Any]], limits: Limits) -> Worker:
  """Starts a worker as "root", as an ordinary "user" in a namespace of users, or with "none" of the isolation."""
  program = Path(worker_program.__file__)
  values = dataclasses.asdict(limits)
  settings = {"isolated": mode != "none", "limits": values, "harnesses": harnesses, "uid": None}
  settings["times"] = _times(harnesses, limits)
  if mode == "none":
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    return Worker([str(interpreter()), *PYTHON_FLAGS, str(program)], settings, environment)
  settings["tmp"] = Path(private_tmp.__file__).read_text(encoding="utf-8")
  settings["seccomp"] = system_call_filter(platform.machine()).hex()
  if mode == "root":
    settings["uid"] = spare_uid(Path("/proc/self/uid_map").read_text())
  else:
    values["processes"] += 2  # the worker and bubblewrap are the same user
  command = bubblewrap_command(program, own_user_namespace=mode == "user")
  return Worker(command, settings, {})


def _times(harnesses: Sequence[Mapping[str, Any]], limits: Limits) -> list[dict[str, Any]]:
  """The limits of CPU and wall time for the jobs of each harness."""
  own = [harness.get("cpu_seconds") or limits.cpu_seconds for harness in harnesses]
  more = [max(0, cpu - limits.cpu_seconds) for cpu in own]
  return [
    {"cpu_seconds": cpu, "wall_seconds": limits.wall_seconds + extra} for cpu, extra in zip(own, more, strict=True)
  ]


@functools.cache
def _find_mode() -> tuple[str, str | None]:
  """Returns the first way of isolation that works, and the reason why there is none."""
  if shutil.which("bwrap") is None:
    return "none", f"Nothing isolates here: bubblewrap is not installed ({INSTALL})."
  if platform.machine() not in ("x86_64", "aarch64"):
    return "none", f"Nothing isolates here: no filter of system calls is known for {platform.machine()}."
  reasons = []
  for mode in _possible_modes():
    try:
      _try_mode(mode)
      return mode, None
    except (OSError, RuntimeError) as error:
      reasons.append(f"{error}"[-500:])
  return "none", f"Nothing isolates here: bubblewrap is installed but cannot be used: {'; '.join(reasons)}"


def _possible_modes() -> Iterator[str]:
  if os.geteuid() == 0 and spare_uid(Path("/proc/self/uid_map").read_text()) is not None:
    yield "root"
  yield "user"


def _try_mode(mode: str) -> None:
  """Raises unless a job's process can be shut in, and can start another within its limit on processes."""
  source = "import os\ndef run(payload):\n  return os.waitstatus_to_exitcode(os.system('exit 7'))\n"
  worker = _start(mode, [{"name": "probe", "source": source, "setup": None}], Limits())
  with contextlib.closing(worker):
    worker.wait_until_ready()
    workers = [worker]
    (reply,) = Dispatch([JOB.pack(0, 4) + b"null"], workers, lambda: worker, PATIENCE_SECONDS).run()
  if reply != Reply(worker_program.OK, b"7"):
    raise RuntimeError(f"a trial answer ended with {_outcome(reply)}")
