"""What a sandbox does for honest answers, odd results, wrong arguments and sick workers."""

import dataclasses
import math
import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from cqd_jax.sandbox import sandbox as module
from cqd_jax.sandbox.isolation import spare_uid, system_call_filter
from cqd_jax.sandbox.pool import Dispatch, Reply, Worker
from cqd_jax.sandbox.sandbox import Limits, Sandbox, SandboxUnavailable, probe
from cqd_jax.sandbox.worker import JOB, KILLED, OK, find_non_json
from cqd_jax.tasks.execution import Harness, Job, Outcome

needs_isolation = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")

ECHO = Harness("echo", "def run(payload):\n  return payload")
PYTHON = Harness("python", "import math\ndef run(payload):\n  space = {}\n  exec(payload, space)\n  return space['x']")
SHELL = Harness(
  "shell",
  """
import pathlib, subprocess
def prepare(setup):
  global tree
  tree = setup
def run(payload):
  for name, text in tree.items():
    pathlib.Path(name).write_text(text)
  done = subprocess.run(["sh", "-c", payload], capture_output=True, text=True)
  return [done.returncode, done.stdout]
""",
  setup={"first": "a\nb\na\n", "second": "c\n"},
)


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox([ECHO, PYTHON, SHELL], limits=Limits(result_bytes=1000), workers=2) as opened:
    yield opened


@needs_isolation
class TestOutcomes:
  def test_values_come_back_unchanged_in_order(self, sandbox):
    values = [None, True, 0, -1.5, 2**70, "", "é☃\U0001f600\0", [], [[1], {"a": [None]}], {}, {"": {"b": 0.1}}]
    values += list(range(200))
    assert sandbox.run([Job("echo", value) for value in values]) == [Outcome("ok", value) for value in values]

  def test_no_jobs(self, sandbox):
    assert sandbox([]) == []

  def test_types_of_numbers_survive(self, sandbox):
    outcomes = sandbox.run([Job("echo", value) for value in (1, 1.0, True)])
    assert [type(outcome.value) for outcome in outcomes] == [int, float, bool]

  def test_shell_with_a_prepared_tree(self, sandbox):
    commands = ["grep a first | wc -l", "cat second", "ls", "cat missing", "echo more >>first; wc -l <first"]
    outcomes = sandbox.run([Job("shell", command) for command in commands])
    assert [outcome.value for outcome in outcomes] == [
      [0, "2\n"], [0, "c\n"], [0, "first\nsecond\n"], [1, ""], [0, "4\n"],
    ]  # fmt: skip

  @pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
      ("x = float('nan')", "error", "value is nan"),
      ("x = [float('inf')]", "error", "value[0] is inf"),
      ("x = {1: 2}", "error", "a key of value is a int"),
      ("x = {'a': (1, 2)}", "error", "value['a'] is a tuple"),
      ("x = {1}", "error", "value is a set"),
      ("x = b''", "error", "value is a bytes"),
      ("class S(str): pass\nx = S('a')", "error", "value is a S"),
      ("x = '\\ud800'", "error", "surrogates not allowed"),
      ("x = 10**5000", "error", "Exceeds the limit"),
      ("x = []\nx.append(x)", "error", "deeper than 100 levels"),
      ("x = []\nfor _ in range(100000): x = [x]", "error", "deeper than 100 levels"),
      ("x = []\nfor _ in range(101): x = [x]", "error", "deeper than 100 levels"),
      ("x = 'a' * 1001", "overflow", "1003 bytes"),
      ("x = 'a' * 50000000", "overflow", "50000002 bytes"),
      ("def f(): return f()\nf()", "error", "RecursionError"),
      ("import sys\nsys.setrecursionlimit(10**9)\nx = 0\nfor _ in range(200000): x = [x]\nrepr(x)", "killed", "ended"),
      ("1 / 0", "error", "ZeroDivisionError: division by zero"),
      ("x = ", "error", "SyntaxError"),
      ("class E(Exception):\n  def __str__(self): return 1\nraise E", "error", "cannot be shown"),
      ("raise ValueError('\\ud800' * 10000)", "error", "ValueError: \\ud800"),
      ("import os\nos.abort()", "killed", "ended"),
    ],
  )
  def test_odd_results_have_defined_outcomes(self, sandbox, code, status, detail):
    outcome, after = sandbox.run([Job("python", code), Job("echo", code)])
    assert outcome.status == status, outcome
    assert detail in outcome.detail
    assert outcome.value is None
    assert len(outcome.detail) < 6000
    assert after == Outcome("ok", code)

  def test_depth_up_to_the_limit_is_returned(self, sandbox):
    (outcome,) = sandbox.run([Job("python", "x = []\nfor _ in range(99): x = [x]")])
    value, depth = outcome.value, 0
    while value:
      value, depth = value[0], depth + 1
    assert depth == 99

  def test_lone_surrogates_may_go_in(self, sandbox):
    assert sandbox.run([Job("python", "'\ud800'\nx = 1")])[0].status == "error"

  def test_random_and_hashes_are_reproducible(self):
    source = "import random\ndef run(payload):\n  return [random.random(), hash('a'), list({'a', 'b', 'c'})]"
    both = []
    for _ in range(2):
      with Sandbox([Harness("random", source)], workers=1) as opened:
        both += opened.run([Job("random", 0), Job("random", 1)])
    assert both[0].status == "ok"
    assert both == [both[0]] * 4


@needs_isolation
class TestSharing:
  SOURCE = "import time\ndef run(payload):\n  return time.monotonic_ns()"

  def test_identical_jobs_are_executed_once(self):
    with Sandbox([Harness("clock", self.SOURCE)], workers=2) as opened:
      first = opened.run([Job("clock", {"a": 1}), Job("clock", {"a": 2}), Job("clock", {"a": 1})])
      again = opened.run([Job("clock", {"a": 2}), Job("clock", {"a": 3})])
    assert first[0] == first[2] != first[1] == again[0] != again[1]

  def test_outcomes_share_no_mutable_value(self, sandbox):
    first, second = sandbox.run([Job("echo", [1]), Job("echo", [1])])
    first.value.append(2)
    assert second.value == [1]

  def test_memory_is_bounded_and_forgets_the_oldest(self, monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 3 * (module.REMEMBERED_OVERHEAD + 30))
    with Sandbox([Harness("clock", self.SOURCE)], workers=1) as opened:
      before = opened.run([Job("clock", index) for index in range(5)])
      assert opened.run([Job("clock", 4)])[0] == before[4]
      assert opened.run([Job("clock", 0)])[0] != before[0]

  def test_workers_outlive_the_thread_that_started_them(self):
    """Bubblewrap's --die-with-parent means the thread; a worker that dies is replaced, for a new process identity."""
    opened = []
    thread = threading.Thread(target=lambda: opened.append(Sandbox([ECHO], workers=1)))
    thread.start()
    thread.join()
    with opened[0] as sandbox:
      (worker,) = sandbox._workers
      time.sleep(0.3)
      assert sandbox.run([Job("echo", 1)]) == [Outcome("ok", 1)]
      assert sandbox._workers == [worker]

  def test_threads_take_turns(self, sandbox):
    results = {}

    def work(thread):
      results[thread] = sandbox.run([Job("echo", [thread, index]) for index in range(50)])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert results == {t: [Outcome("ok", [t, index]) for index in range(50)] for t in range(3)}


@needs_isolation
class TestErrors:
  @pytest.mark.parametrize(
    ("source", "message"),
    [
      ("def run(payload)", "SyntaxError"),
      ("x = 1", "'bad': its source defines no function `run`"),
      ("def run(p): pass\ndef prepare(setup): raise KeyError(setup)", "KeyError: 'what was set up'"),
      ("import numpy", "No module named 'numpy'"),
    ],
  )
  def test_harness_that_fails_at_the_start(self, source, message):
    with pytest.raises(RuntimeError, match=message):
      Sandbox([Harness("bad", source, setup="what was set up")], workers=2)

  def test_what_fails_at_the_start_is_said_whole_however_small_results_may_be(self):
    source = "def prepare(setup):\n  raise KeyError('x' * 20_000 + 'the end')\ndef run(payload): pass"
    with pytest.raises(RuntimeError, match=r"KeyError: 'x{20000}the end'"):
      Sandbox([Harness("bad", source)], limits=Limits(result_bytes=10), workers=1)

  @pytest.mark.parametrize(
    "payload", [math.nan, {"a": [1, -math.inf]}, {1: 2}, (1,), b"", pytest.param(10**5000, id="huge")]
  )
  def test_payload_that_is_no_json(self, sandbox, payload):
    with pytest.raises(ValueError, match=r"jobs\[1\]\.payload: expected JSON"):
      sandbox.run([Job("echo", 0), Job("echo", payload)])

  def test_unknown_harness(self, sandbox):
    with pytest.raises(ValueError, match=r"jobs\[0\]\.harness: expected one of \['echo', .*got 'ech'"):
      sandbox.run([Job("ech", 0)])

  def test_names_are_unique(self):
    with pytest.raises(ValueError, match="harnesses: expected unique names"):
      Sandbox([ECHO, ECHO])

  def test_workers_are_positive(self):
    with pytest.raises(ValueError, match="workers: expected workers >= 1, got 0"):
      Sandbox([ECHO], workers=0)

  def test_closed(self):
    opened = Sandbox([ECHO], workers=1)
    opened.close()
    opened.close()
    with pytest.raises(RuntimeError, match="closed"):
      opened.run([Job("echo", 0)])


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("wall_seconds", 0.0), ("wall_seconds", math.nan), ("cpu_seconds", 0), ("processes", True),
    ("memory_bytes", 1 << 20), ("tmp_bytes", 0), ("open_files", 3), ("result_bytes", -1), ("file_bytes", 1 << 60),
  ],
)  # fmt: skip
def test_limits_are_checked(name, value):
  with pytest.raises(ValueError, match=f"{name}: expected"):
    dataclasses.replace(Limits(), **{name: value})


@pytest.mark.parametrize(
  ("value", "found"),
  [({"a": [1, None, True, 1.5, "x"]}, ""), ([0, (1,)], "value[1] is a tuple"), ({1: 0}, "a key of value is a int")],
)  # fmt: skip
def test_find_non_json(value, found):
  assert find_non_json(value) == found


@pytest.mark.parametrize("seconds", [0, -1, 3601])
def test_seconds_of_a_harness_are_checked(seconds):
  with pytest.raises(ValueError, match=f"cpu_seconds: expected 1 to 3600, got {seconds}"):
    Harness("echo", ECHO.source, cpu_seconds=seconds)


@needs_isolation
def test_a_harness_may_have_a_time_of_its_own():
  spin = "import time\nx = 0\nwhile time.process_time() < 1.4: x += 1"
  patient, quick = (dataclasses.replace(PYTHON, name=name, cpu_seconds=cpu) for name, cpu in (("a", 30), ("b", 1)))
  sleeper = "import time\ntime.sleep(1.4)\nx = 1"
  timeout = Outcome("timeout", None, "over 1 s of time")
  with Sandbox([quick, patient], limits=Limits(cpu_seconds=1, wall_seconds=1.0), workers=2) as opened:
    slow, cut, asleep, too_long = opened.run([Job("a", spin), Job("b", spin), Job("a", sleeper), Job("b", sleeper)])
  assert [slow.status, cut.status, asleep, too_long] == ["ok", "timeout", Outcome("ok", 1), timeout]


class TestWithoutIsolation:
  @pytest.fixture(autouse=True)
  def _nothing_isolates(self, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    module._find_mode.cache_clear()
    yield
    module._find_mode.cache_clear()

  def test_refuses_with_the_reason_and_the_way_out(self):
    assert "bubblewrap is not installed (apt-get install bubblewrap" in probe()
    with pytest.raises(SandboxUnavailable, match=r"not installed \(apt-get install bubblewrap.*--unsafe"):
      Sandbox([ECHO])

  def test_tells_what_bubblewrap_said(self, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR | stat.S_IXOTH)
    with pytest.raises(SandboxUnavailable, match="cannot be used: bwrap: No permissions to create a new namespace"):
      Sandbox([ECHO])

  def test_unsafe_executes_with_limits_and_cleans_up(self):
    daemon = "import os, time\nx = os.getcwd()\nopen('left', 'w').close()\nif os.fork() == 0: time.sleep(1000)"
    jobs = ["x = 9", "while True: pass", "import os\nos._exit(0)", "x = bytes(1 << 33)", daemon, "x = 8"]
    with Sandbox([PYTHON], limits=Limits(cpu_seconds=1), workers=1, unsafe=True) as opened:
      assert not opened.isolated
      outcomes = opened.run([Job("python", job) for job in jobs])
    assert [outcome.status for outcome in outcomes] == ["ok", "timeout", "killed", "error", "ok", "ok"]
    assert not os.path.exists(outcomes[4].value)
    assert [outcomes[0].value, outcomes[5].value] == [9, 8]


FAKE_WORKER = """
import os, socket, struct, sys, time
control = socket.socket(fileno=0)
def take():
  order, channels, *_ = socket.recv_fds(control, 4, 1)
  return open(channels[0], "r+b", buffering=0) if order else None
def answer(channel, status, body):
  channel.write(word + struct.pack("!BI", status, len(body)) + body)
  channel.close()
  control.send(bytes(1))
status = 5
while channel := take():
  word, size = channel.read(16), struct.unpack("!II", channel.read(8))[1]
  payload = channel.read(size)
  if payload == b"die": os._exit(1)
  if payload == b"hang": time.sleep(1000)
  if payload == b"die once" and not os.path.exists(sys.argv[1]): open(sys.argv[1], "w"); os._exit(1)
  answer(channel, status, b"" if status else payload)
  status = 0
"""


def test_sick_workers_are_replaced_and_their_jobs_tried_once_more(tmp_path):
  started = []
  settings = {"limits": dataclasses.asdict(Limits()), "times": [{"wall_seconds": 5.0, "cpu_seconds": 2}]}

  def start():
    worker = Worker([sys.executable, "-c", FAKE_WORKER, str(tmp_path / "died")], settings, {})
    worker.wait_until_ready()
    started.append(worker)
    return worker

  payloads = [b"%d" % index for index in range(30)]
  payloads[3], payloads[7], payloads[20] = b"die", b"hang", b"die once"
  workers = [start(), start()]
  replies = Dispatch([JOB.pack(0, len(p)) + p for p in payloads], workers, start, patience=0.5).run()
  for worker in workers:
    worker.close()
  expected = [Reply(OK, payload) for payload in payloads]
  expected[3] = Reply(KILLED, b"the worker ended twice over it")
  expected[7] = Reply(KILLED, b"the worker did not answer twice over it")
  assert replies == expected
  assert len(started) == 2 + 2 + 2 + 1


PINNED = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.cpu_count = lambda: 64
from cqd_jax.sandbox.sandbox import Sandbox, usable_cpus
from cqd_jax.tasks.execution import Harness
with Sandbox([Harness("echo", "def run(payload):\\n  return payload")], unsafe=True) as sandbox:
  print(usable_cpus(), len(sandbox._workers))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to CPUs")
def test_a_process_bound_to_one_cpu_starts_one_worker():
  done = subprocess.run([sys.executable, "-c", PINNED], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["1", "1"]


def test_spare_users_exist_and_differ():
  full = [spare_uid("         0          0 4294967295\n") for _ in range(100)]
  assert len(set(full)) == 100
  assert all(2**30 <= uid < 2**31 for uid in full)
  few = [spare_uid("0 1000 1\n1 100000 65536\n") for _ in range(100)]
  assert len(set(few)) == 100
  assert all(1000 < uid < 65537 for uid in few)
  assert spare_uid("0 1000 1\n") is None


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_jumps_stay_inside(machine):
  program = system_call_filter(machine)
  steps = [program[start : start + 8] for start in range(0, len(program), 8)]
  assert len(program) % 8 == 0
  for index, step in enumerate(steps):
    assert index + max(step[2], step[3]) + 1 < len(steps) or step[0] == 0x06
  assert steps[-1] == bytes([0x06, 0, 0, 0, 0, 0, 0xFF, 0x7F])  # what nothing refused is allowed
