"""A sandbox on demand starts with the first job and not before; several tasks may bring one harness."""

import contextlib
import dataclasses
import subprocess
import threading
import time

import pytest

from cqd_jax.sandbox import on_demand, sandbox
from cqd_jax.sandbox.on_demand import SandboxOnDemand, distinct_harnesses
from cqd_jax.sandbox.sandbox import Limits, SandboxUnavailable, probe
from cqd_jax.tasks.execution import Harness, Job, Outcome, Service

needs_isolation = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")

ECHO = Harness("echo", "def run(payload):\n  return payload", setup={"a": [1, 2]})
TWICE = Harness("twice", "def run(payload):\n  return 2 * payload")


@pytest.fixture
def started(monkeypatch):
  """The commands of all processes that were started."""
  probe()  # starts one by itself, if nobody has asked yet
  commands = []
  popen = subprocess.Popen

  class Counting(popen):
    def __init__(self, command, *arguments, **options):
      commands.append(command)
      super().__init__(command, *arguments, **options)

  monkeypatch.setattr(subprocess, "Popen", Counting)
  return commands


@needs_isolation
def test_nothing_is_started_before_the_first_job(started):
  with SandboxOnDemand([ECHO, TWICE, dataclasses.replace(ECHO)], workers=2) as opened:
    assert opened.run([]) == []
    assert opened([]) == []
    assert opened.isolated is None
    assert started == []
    assert opened.run([Job("echo", 1), Job("twice", 2)]) == [Outcome("ok", 1), Outcome("ok", 4)]
    assert opened.isolated is True
    assert len(started) == 2
    assert opened([Job("twice", 4)]) == [Outcome("ok", 8)]
    assert len(started) == 2


def test_what_was_never_used_is_closed_without_a_start(started, monkeypatch):
  monkeypatch.setattr(sandbox, "_find_mode", lambda: pytest.fail("it was looked for"))
  with SandboxOnDemand([ECHO]) as opened:
    pass
  opened.close()
  assert started == []
  for jobs in ([], [Job("echo", 1)]):
    with pytest.raises(RuntimeError, match="run: the sandbox is closed"):
      opened.run(jobs)


@needs_isolation
def test_closing_ends_the_workers():
  with SandboxOnDemand([ECHO], workers=1) as opened:
    opened.run([Job("echo", 1)])
  opened.close()
  with pytest.raises(RuntimeError, match="run: the sandbox is closed"):
    opened.run([Job("echo", 1)])


@needs_isolation
def test_threads_share_one_sandbox(started):
  results = {}
  with SandboxOnDemand([ECHO], workers=1) as opened:

    def work(thread):
      results[thread] = opened.run([Job("echo", [thread, index]) for index in range(20)])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(5)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert results == {t: [Outcome("ok", [t, index]) for index in range(20)] for t in range(5)}
  assert len(started) == 1


def test_one_that_is_closed_while_it_starts_ends_what_it_started(monkeypatch):
  """A thread closes it while another waits for the start: the start is completed, then closed."""
  starting, closed = threading.Event(), []

  class Slow:
    isolated = True

    def __init__(self, harnesses, **_):
      starting.set()
      time.sleep(0.2)

    def run(self, jobs):
      return [Outcome("ok")] * len(jobs)

    def close(self):
      closed.append(self)

  monkeypatch.setattr(on_demand, "Sandbox", Slow)
  opened = SandboxOnDemand([ECHO])
  thread = threading.Thread(target=opened.run, args=([Job("echo", 1)],))
  thread.start()
  starting.wait()
  opened.close()
  thread.join()
  assert len(closed) == 1


def test_arguments_reach_the_sandbox(monkeypatch):
  given = {}

  def start(harnesses, **options):
    given.update(options, harnesses=harnesses)
    raise SandboxUnavailable("not here")

  monkeypatch.setattr(on_demand, "Sandbox", start)
  opened = SandboxOnDemand([ECHO, TWICE, ECHO], workers=3, unsafe=True, limits=Limits(cpu_seconds=1))
  for _ in range(2):  # it is tried again
    with pytest.raises(SandboxUnavailable, match="not here"):
      opened.run([Job("echo", 1)])
  assert given == {"harnesses": [ECHO, TWICE], "workers": 3, "unsafe": True, "limits": Limits(cpu_seconds=1)}
  assert opened.isolated is None


@pytest.mark.parametrize("changes", [{"source": "run = print"}, {"setup": {"a": [1, 2.0]}}, {"setup": None}])
def test_one_name_for_different_harnesses_is_refused_by_it(changes):
  with pytest.raises(ValueError, match="harnesses: expected one of each name, got two that differ named 'echo'"):
    SandboxOnDemand([TWICE, ECHO, dataclasses.replace(ECHO, **changes)])


def test_arguments_are_checked_at_once():
  with pytest.raises(ValueError, match="workers: expected workers >= 1, got 0"):
    SandboxOnDemand([ECHO], workers=0)


def test_each_harness_is_taken_once_in_order():
  assert distinct_harnesses([TWICE, ECHO, dataclasses.replace(TWICE), ECHO]) == [TWICE, ECHO]
  assert distinct_harnesses([]) == []


class Shop:
  """A service that says what it was asked, and keeps when it was opened and closed."""

  def __init__(self, name="shop", fingerprint="1", answer=lambda job: Outcome("ok", ["shop", job.payload])):
    self.log = []
    self.answer = answer
    self.service = Service(name, fingerprint, self.start)

  @contextlib.contextmanager
  def start(self, workers, unsafe):
    self.log.append(("open", workers, unsafe))
    yield lambda jobs: [self.answer(job) for job in jobs]
    self.log.append(("closed",))


@needs_isolation
def test_jobs_go_to_the_service_or_the_sandbox_that_they_name(started):
  shop, idle = Shop(), Shop("idle")
  with SandboxOnDemand([ECHO, shop.service, TWICE, idle.service, Shop().service], workers=1) as opened:
    assert opened.run([Job("shop", 1), Job("shop", 2)]) == [Outcome("ok", ["shop", 1]), Outcome("ok", ["shop", 2])]
    assert (opened.isolated, started) == (None, [])
    mixed = [Job("twice", 1), Job("shop", 3), Job("echo", 4), Job("shop", 5)]
    assert [outcome.value for outcome in opened.run(mixed)] == [2, ["shop", 3], 4, ["shop", 5]]
    assert shop.log == [("open", 1, False)]
  assert shop.log == [("open", 1, False), ("closed",)]
  assert idle.log == []
  with pytest.raises(RuntimeError, match="run: the sandbox is closed"):
    opened.run([Job("shop", 1)])


def test_an_unknown_name_is_refused_before_anything_starts():
  shop = Shop()
  with (
    SandboxOnDemand([ECHO, shop.service]) as opened,
    pytest.raises(ValueError, match=r"jobs\[1\].harness: expected one of \['echo', 'shop'\], got 'shp'"),
  ):
    opened.run([Job("shop", 1), Job("shp", 1)])
  assert shop.log == []


def test_a_service_that_answers_too_little_is_named():
  @contextlib.contextmanager
  def start(workers, unsafe):
    yield lambda jobs: [Outcome("ok")]

  with (
    SandboxOnDemand([Service("lazy", "1", start)]) as opened,
    pytest.raises(ValueError, match="lazy: expected 2 outcomes, got 1"),
  ):
    opened.run([Job("lazy", 1), Job("lazy", 2)])


def test_one_name_for_a_service_and_something_else_is_refused():
  for other in (ECHO, Shop("echo", "2").service):
    with pytest.raises(ValueError, match="expected one of each name, got two that differ named 'echo'"):
      SandboxOnDemand([Shop("echo").service, other])
