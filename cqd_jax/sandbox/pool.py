"""The parent's side of the sandbox's workers: starts them, feeds them, and replaces one that dies or hangs."""

import collections
import contextlib
import functools
import json
import os
import queue
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from cqd_jax.sandbox.worker import (
  DETAIL_CHARACTERS,
  ERROR,
  FAILED,
  JOB,
  KILLED,
  LATE,
  OK,
  ORDER,
  OVERFLOW,
  READY,
  REPLY,
  SPENT,
  TIMEOUT,
  WORD_BYTES,
)

IN_FLIGHT = 8
"""Jobs that a worker has at a time: enough that it never waits for the parent."""

START_SECONDS = 120.0
MOST_OF_A_TRACEBACK = 1 << 20
"""Bytes of what a worker says of a harness that failed."""

Started: TypeAlias = "queue.SimpleQueue[subprocess.Popen[bytes] | Exception]"
Order: TypeAlias = tuple[Callable[[], subprocess.Popen[bytes]], Started]
"""What starts a process, and where it is awaited."""


class Reply(NamedTuple):
  """What came of a job: its status (a constant of `worker`) and the body, still bytes."""

  status: int
  body: bytes


class Exchange:
  """What passes between the parent and the process of one job, through a channel of their own.

  Attributes:
    job: its number in the caller's list.
    channel: the parent's end, which never blocks.
    theirs: the other end, until the worker has it.
    order: what tells the worker of it.
    harness: the index of its harness.
    got: what was read; at most a little more than is allowed.
  """

  def __init__(self, job: int, message: bytes, result_bytes: int):
    self.job = job
    self.channel, self.theirs = socket.socketpair()
    self.channel.setblocking(False)
    self.order = message[: ORDER.size]
    self.harness: int = ORDER.unpack(self.order)[0]
    self.got = b""
    self._word = os.urandom(WORD_BYTES)
    self._outgoing = memoryview(self._word + message)
    self._result_bytes = result_bytes
    self._needed = WORD_BYTES + REPLY.size

  @property
  def events(self) -> int:
    """What to wait for."""
    return (select.POLLIN if len(self.got) < self._needed else 0) | (select.POLLOUT if self._outgoing else 0)

  def advance(self) -> None:
    """Writes and reads as much as can be without waiting. A process that is gone is no error here."""
    try:
      while self._outgoing:
        self._outgoing = self._outgoing[self.channel.send(self._outgoing) :]
    except BlockingIOError:
      pass
    except (BrokenPipeError, ConnectionResetError):
      self._outgoing = memoryview(b"")
    with contextlib.suppress(BlockingIOError):
      while len(self.got) < self._needed:
        self._take(self._receive())

  def _receive(self) -> bytes:
    try:
      return self.channel.recv(1 << 16)
    except ConnectionResetError:
      return b""

  def _take(self, chunk: bytes) -> None:
    self.got += chunk
    if not chunk:
      self._needed = 0
    elif not self._word.startswith(self.got[:WORD_BYTES]):
      self.close()
    elif len(self.got) >= WORD_BYTES + REPLY.size:
      length = REPLY.unpack_from(self.got, WORD_BYTES)[1]
      self._needed = WORD_BYTES + REPLY.size + min(length, self._result_bytes + DETAIL_CHARACTERS * 10)

  def close(self) -> None:
    """Ends the channel: what the process still writes there fails."""
    self._outgoing = memoryview(b"")
    self._needed = 0
    self.channel.close()
    self.theirs.close()

  def reply(self, notice: int, times: Sequence[Mapping[str, Any]]) -> Reply:
    """What came of the job, once the worker has given notice that nothing of it is alive.

    Args:
      notice: how its process ended.
      times: the limits of time, by the index of the harness.
    """
    self.advance()
    self.close()
    if self.got and not self._word.startswith(self.got[:WORD_BYTES]):
      return Reply(ERROR, b"the answer wrote to the channel of results")
    if len(self.got) >= WORD_BYTES + REPLY.size:
      status, length = REPLY.unpack_from(self.got, WORD_BYTES)
      body = self.got[WORD_BYTES + REPLY.size :][:length]
      if status == OK and len(body) > self._result_bytes:
        return Reply(OVERFLOW, f"a result of {length} bytes; {self._result_bytes} are allowed".encode())
      if len(body) == length and status in (OK, ERROR, OVERFLOW, READY, FAILED):
        return Reply(status, body)
    if notice == LATE:
      return Reply(TIMEOUT, f"over {times[self.harness]['wall_seconds']:g} s of time".encode())
    if notice == SPENT:
      return Reply(TIMEOUT, f"over {times[self.harness]['cpu_seconds']} s of CPU time".encode())
    return Reply(KILLED, b"the process ended without a result")


class Worker:
  """One worker process, and the jobs that it has.

  Attributes:
    in_flight: the jobs sent and not yet answered, in the order of sending, which is that of execution.
    since: when (monotonic seconds) the first of them came to the head.
  """

  def __init__(self, command: Sequence[str], settings: Mapping[str, Any], environment: Mapping[str, str]):
    self.in_flight: collections.deque[Exchange] = collections.deque()
    self.since = 0.0
    self._limits: Mapping[str, Any] = settings["limits"]
    self._times: Sequence[Mapping[str, Any]] = settings["times"]
    self._unsent: collections.deque[Exchange] = collections.deque()
    self._control, theirs = socket.socketpair()
    with theirs:
      self._process = start_process(
        command,
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        bufsize=0,
        cwd="/",
        start_new_session=True,
      )
    self._control.setblocking(False)
    content = json.dumps(settings).encode()
    self._queue(Exchange(0, JOB.pack(0, len(content)) + content, MOST_OF_A_TRACEBACK))

  def wait_until_ready(self) -> None:
    """Returns once the worker takes jobs.

    Raises:
      RuntimeError: with the traceback of a harness, or with what bubblewrap said.
      TimeoutError: if nothing was heard for `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
      wait([self], deadline - time.monotonic())
      if (replies := self.advance()) is None:
        starting = self.in_flight[0]
        if starting.got[WORD_BYTES:]:  # it said why
          reply = starting.reply(KILLED, self._times)
          raise RuntimeError(f"the sandbox's worker failed to start:\n{reply.body.decode()}")
        raise RuntimeError(self._last_words())
      if replies:
        return
    raise TimeoutError(f"the sandbox's worker did not start within {START_SECONDS:g} s")

  def _last_words(self) -> str:
    self._process.kill()
    said = self._process.communicate()[1].decode(errors="replace").strip()
    return said or f"the sandbox's worker ended with code {self._process.returncode}"

  def send(self, job: int, message: bytes) -> None:
    """Queues a job; `advance` brings it on its way."""
    self._queue(Exchange(job, message, self._limits["result_bytes"]))

  def _queue(self, exchange: Exchange) -> None:
    if not self.in_flight:
      self.since = time.monotonic()
    self.in_flight.append(exchange)
    self._unsent.append(exchange)

  def events(self) -> Iterator[tuple[socket.socket, int]]:
    """Sockets and what to wait for there; then `advance` has something to do."""
    yield self._control, select.POLLIN | (select.POLLOUT if self._unsent else 0)
    if self.in_flight and (events := self.in_flight[0].events):
      yield self.in_flight[0].channel, events

  def advance(self) -> list[tuple[int, Reply]] | None:
    """Sends and receives what can be without waiting; returns the jobs done, or None if the worker is gone."""
    try:
      self._send()
      notices: bytes | None = self._control.recv(1 << 10) or None
    except BlockingIOError:
      notices = b""
    except (BrokenPipeError, ConnectionResetError):
      notices = None
    if self.in_flight:
      self.in_flight[0].advance()
    if notices is None:
      return None
    done = []
    for notice in notices:
      exchange = self.in_flight.popleft()
      done.append((exchange.job, exchange.reply(notice, self._times)))
      self.since = time.monotonic()
    return done

  def _send(self) -> None:
    with contextlib.suppress(BlockingIOError):
      while self._unsent:
        exchange = self._unsent[0]
        socket.send_fds(self._control, [exchange.order], [exchange.theirs.fileno()])
        exchange.theirs.close()
        exchange.advance()
        self._unsent.popleft()

  def close(self) -> None:
    """Ends the worker and all that runs in it: at the end of its input if it is idle, else by force."""
    self._control.close()
    if not self.in_flight:
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(timeout=1.0)
    self._process.kill()
    self._process.wait()
    for exchange in self.in_flight:
      exchange.close()
    if self._process.stderr:
      self._process.stderr.close()


def start_process(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
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
  """Waits until one of the workers can go on."""
  poll = select.poll()
  for worker in workers:
    for source, events in worker.events():
      poll.register(source, events)
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
        done = worker.advance()
        self._replies.update(done or [])
        hung = worker.in_flight and time.monotonic() > worker.since + self._patience
        if done is None or hung:
          self._replace(place, "did not answer" if hung else "ended")
    return [self._replies[job] for job in range(len(self._messages))]

  def _feed(self, worker: Worker) -> None:
    if worker.in_flight and worker.in_flight[0].job in self._alone:
      return
    if self._suspects and not worker.in_flight:
      return worker.send(self._suspects[0], self._messages[self._suspects.popleft()])
    # Towards the end a worker takes few at a time, so that none waits behind a slow one while others are idle.
    enough = min(IN_FLIGHT, 1 + len(self._waiting) // len(self._workers))
    while self._waiting and not self._suspects and len(worker.in_flight) < enough:
      job = self._waiting.popleft()
      worker.send(job, self._messages[job])

  def _replace(self, place: int, what_happened: str) -> None:
    worker = self._workers[place]
    if worker.in_flight:
      head, *rest = [exchange.job for exchange in worker.in_flight]
      self._waiting.extendleft(reversed(rest))
      if head in self._alone:
        self._replies[head] = Reply(KILLED, f"the worker {what_happened} twice over it".encode())
      else:
        self._alone.add(head)
        self._suspects.append(head)
    worker.close()
    self._workers[place] = self._start()
