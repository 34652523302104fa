"""Signals, sent for real to processes of their own: the first stops at a safe point, the second at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from cqd_jax.terminal.interrupt import Interrupt, Stopped, interruptible

PROGRAM = """
import sys, time
from cqd_jax.terminal.interrupt import Stopped, interruptible
try:
  with interruptible(lambda text: print(text, flush=True)) as interrupt:
    print("ready", flush=True)
    for step in range(int(sys.argv[1])):
      time.sleep(0.05)
    print("safe point", flush=True)
    interrupt.check()
    print("went on", flush=True)
except Stopped:
  print("stopped", flush=True)
except KeyboardInterrupt:
  print("at once", flush=True)
"""


def run(steps, signals):
  process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(steps)], stdout=subprocess.PIPE, text=True)
  lines = [process.stdout.readline().strip()]
  for number in signals:
    process.send_signal(number)
    lines.append(process.stdout.readline().strip())
  rest, _ = process.communicate(timeout=30)
  return lines + rest.split("\n")[:-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_at_the_next_safe_point(number):
  ready, announced, *rest = run(10, [number])
  assert ready == "ready"
  assert "once more to stop at once" in announced
  assert rest == ["safe point", "stopped"]


def test_the_second_signal_stops_at_once():
  lines = run(1000, [signal.SIGINT, signal.SIGINT])
  assert lines[-1] == "at once"
  assert "safe point" not in lines


def test_without_a_signal_nothing_is_stopped_and_handlers_are_put_back():
  before = signal.getsignal(signal.SIGTERM)
  with interruptible(print) as interrupt:
    interrupt.check()
    assert signal.getsignal(signal.SIGTERM) != before
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
      interrupt.check()
  assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_it_does_nothing():
  found = []

  def work():
    with interruptible(print) as interrupt:
      interrupt.check()
      found.append(isinstance(interrupt, Interrupt))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [True]
