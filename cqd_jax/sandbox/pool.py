"""The parent's side of the sandbox's workers: starts them, feeds them, and replaces one that dies or hangs."""

import collections
import contextlib
import functools
import json
import os
import queue
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from cqd_jax.sandbox.worker import FAILED, JOB, KILLED, READY, REPLY

IN_FLIGHT = 8
"""Jobs that a worker has at a time: enough that it never waits for the parent."""

START_SECONDS = 120.0

Started: TypeAlias = "queue.SimpleQueue[subprocess.Popen[bytes] | Exception]"
Order: TypeAlias = tuple[Callable[[], subprocess.Popen[bytes]], Started]
"""What starts a process, and where it is awaited."""


class Reply(NamedTuple):
  """A worker's answer to a message: its status (a constant of `worker`) and the body, still bytes."""

  status: int
  body: bytes


class Worker:
  """One worker process, and the jobs that it has.

  Attributes:
    in_flight: the jobs sent and not yet answered, in the order of sending, which is that of execution.
    since: when (monotonic seconds) the first of them came to the head.
  """

  def __init__(self, command: Sequence[str], settings: Mapping[str, Any], environment: Mapping[str, str]):
    self.in_flight: collections.deque[int] = collections.deque()
    self.since = 0.0
    self._outgoing = bytearray()
    self._incoming = bytearray()
    self._process = _started(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=environment,
      bufsize=0,
      cwd="/",
      start_new_session=True,
    )
    assert self._process.stdin
    assert self._process.stdout
    self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
    os.set_blocking(self.stdin, False)
    os.set_blocking(self.stdout, False)
    content = json.dumps(settings).encode()
    self._outgoing += JOB.pack(0, len(content)) + content

  def wait_until_ready(self) -> None:
    """Returns once the worker takes jobs.

    Raises:
      RuntimeError: with the traceback of a harness, or with what bubblewrap said.
      TimeoutError: if nothing was heard for `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
      wait([self], deadline - time.monotonic())
      if not self.write() or (replies := self.read()) is None:
        raise RuntimeError(self._last_words())
      for reply in replies:
        if reply.status == READY:
          return
        if reply.status == FAILED:
          raise RuntimeError(f"the sandbox's worker failed to start:\n{reply.body.decode()}")
    raise TimeoutError(f"the sandbox's worker did not start within {START_SECONDS:g} s")

  def _last_words(self) -> str:
    self._process.kill()
    said = self._process.communicate()[1].decode(errors="replace").strip()
    return said or f"the sandbox's worker ended with code {self._process.returncode}"

  def send(self, job: int, message: bytes) -> None:
    """Queues a job; `write` brings it on its way."""
    if not self.in_flight:
      self.since = time.monotonic()
    self.in_flight.append(job)
    self._outgoing += message

  @property
  def has_outgoing(self) -> bool:
    """Whether `write` has something to do."""
    return bool(self._outgoing)

  def write(self) -> bool:
    """Writes as much as the pipe takes without waiting; False if the worker is gone."""
    try:
      while self._outgoing:
        del self._outgoing[: os.write(self.stdin, self._outgoing[: 1 << 20])]
    except BlockingIOError:
      pass
    except BrokenPipeError:
      return False
    return True

  def read(self) -> list[Reply] | None:
    """Reads what is there, if anything; None if the worker is gone."""
    try:
      chunk = os.read(self.stdout, 1 << 20)
    except BlockingIOError:
      return []
    if not chunk:
      return None
    self._incoming += chunk
    replies = []
    while len(self._incoming) >= REPLY.size:
      status, length = REPLY.unpack_from(self._incoming)
      if len(self._incoming) < REPLY.size + length:
        break
      replies.append(Reply(status, bytes(self._incoming[REPLY.size : REPLY.size + length])))
      del self._incoming[: REPLY.size + length]
    return replies

  def close(self) -> None:
    """Ends the worker and all that runs in it: at the end of its input if it is idle, else by force."""
    assert self._process.stdin
    assert self._process.stdout
    self._process.stdin.close()
    self._process.stdout.close()
    if not self.in_flight:
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(timeout=1.0)
    self._process.kill()
    self._process.wait()
    if self._process.stderr:
      self._process.stderr.close()


def _started(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
  """As `subprocess.Popen`, by a thread that lives as long as this process.

  To the kernel the parent is the thread: bubblewrap's --die-with-parent would end a worker with the thread that
  happened to need it first.
  """
  done: Started = queue.SimpleQueue()
  _orders(os.getpid()).put((lambda: subprocess.Popen(command, **options), done))
  process = done.get()
  if isinstance(process, Exception):
    raise process
  return process


@functools.cache
def _orders(pid: int) -> "queue.SimpleQueue[Order]":
  """Where the starting thread of this process waits for what it is to start; a forked process has one of its own."""
  orders: queue.SimpleQueue[Order] = queue.SimpleQueue()

  def serve() -> None:
    while True:
      start, done = orders.get()
      try:
        done.put(start())
      except Exception as error:
        done.put(error)

  threading.Thread(target=serve, name="sandbox-starter", daemon=True).start()
  return orders


def wait(workers: Sequence[Worker], seconds: float) -> None:
  """Waits until one of the workers can be read or, where something is to be written, written."""
  poll = select.poll()
  for worker in workers:
    poll.register(worker.stdout, select.POLLIN)
    if worker.has_outgoing:
      poll.register(worker.stdin, select.POLLOUT)
  poll.poll(max(seconds, 0.0) * 1000)


class Dispatch:
  """The execution of one list of messages by the workers; each finished job takes in the next.

  A worker that dies, or gives no reply for `patience` seconds, is replaced. The job that it had at its head is tried
  once more, alone in a worker, and then reported as killed; those behind it had not begun and go to other workers.
  """

  def __init__(self, messages: Sequence[bytes], workers: list[Worker], start: Callable[[], Worker], patience: float):
    self._messages, self._workers, self._start, self._patience = messages, workers, start, patience
    self._waiting = collections.deque(range(len(messages)))
    self._suspects: collections.deque[int] = collections.deque()
    self._alone: set[int] = set()
    self._replies: dict[int, Reply] = {}

  def run(self) -> list[Reply]:
    """Returns the replies in the order of the messages; `workers` holds those that live at the end."""
    while len(self._replies) < len(self._messages):
      for worker in self._workers:
        self._feed(worker)
      wait(self._workers, min(self._patience, 1.0))
      for place, worker in enumerate(self._workers):
        replies = worker.read()
        self._take(worker, replies or [])
        hung = worker.in_flight and time.monotonic() > worker.since + self._patience
        if replies is None or hung or not worker.write():
          self._replace(place, "did not answer" if hung else "ended")
    return [self._replies[job] for job in range(len(self._messages))]

  def _feed(self, worker: Worker) -> None:
    if worker.in_flight and worker.in_flight[0] in self._alone:
      return
    if self._suspects and not worker.in_flight:
      return worker.send(self._suspects[0], self._messages[self._suspects.popleft()])
    # Towards the end a worker takes few at a time, so that none waits behind a slow one while others are idle.
    enough = min(IN_FLIGHT, 1 + len(self._waiting) // len(self._workers))
    while self._waiting and not self._suspects and len(worker.in_flight) < enough:
      job = self._waiting.popleft()
      worker.send(job, self._messages[job])

  def _take(self, worker: Worker, replies: Sequence[Reply]) -> None:
    for reply in replies:
      self._replies[worker.in_flight.popleft()] = reply
      worker.since = time.monotonic()

  def _replace(self, place: int, what_happened: str) -> None:
    worker = self._workers[place]
    if worker.in_flight:
      head, *rest = worker.in_flight
      self._waiting.extendleft(reversed(rest))
      if head in self._alone:
        self._replies[head] = Reply(KILLED, f"the worker {what_happened} twice over it".encode())
      else:
        self._alone.add(head)
        self._suspects.append(head)
    worker.close()
    self._workers[place] = self._start()
