"""Runs of every kind of method on the toy problem, killed with SIGKILL at random points until they are through.

CQD_KILLS sets how many kills; a few by default, since each costs a start of the program.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loop_cases import told

pytestmark = pytest.mark.soak
KILLS = int(os.environ.get("CQD_KILLS", "4"))
BUDGET = 48
NAMES = ("CycleQD", "CMA-ES", "NSGA-II", "random search", "task arithmetic")

PROGRAM = """
import sys
sys.path[:0] = [{cases!r}]
import jax
jax.config.update("jax_numpy_rank_promotion", "allow")
from loop_cases import METHODS, Plain
from script_cases import call
from cqd_jax.config.settings import OutputSettings
print("ready", flush=True)
call({run_dir!r}, Plain(), methods=list(METHODS.values()), budget={budget}, output=OutputSettings(checkpoint_every=2, tensorboard=False))
"""  # noqa: E501


def start(run_dir):
  cases = str(Path(__file__).parents[1] / "run")
  program = PROGRAM.format(cases=cases, run_dir=str(run_dir), budget=BUDGET)
  return subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


def test_it_ends_as_the_undisturbed_run(tmp_path):
  draw, kills, runs = random.Random(0), 0, 0
  undisturbed = start(tmp_path / "reference")
  began = time.monotonic()
  _, error = undisturbed.communicate()
  seconds = time.monotonic() - began
  assert undisturbed.returncode == 0, error.decode()
  while kills < KILLS:
    run_dir = tmp_path / f"run-{runs}"
    more, seconds = kill_until_through(run_dir, draw, seconds, at_most=KILLS - kills)
    kills, runs = kills + more, runs + 1
    for name in NAMES:
      for what, expected in told(tmp_path / "reference", name).items():
        assert repr(told(run_dir, name)[what]) == repr(expected), (run_dir, name, what)
    assert (run_dir / "table.md").read_text() == (tmp_path / "reference" / "table.md").read_text()
  print(f"{kills} kills of {runs} runs")


def kill_until_through(run_dir, draw, seconds, at_most):
  """Begins and resumes a run, killing it at random moments, until it is through.

  Returns how often it was killed, and the seconds from which moments are drawn: those of the fastest session so far, as
  a machine that was busy at first would let all later ones end in peace.
  """
  kills = 0
  while kills < at_most:
    process = start(run_dir)
    assert process.stdout.readline() == b"ready\n"
    began, moment = time.monotonic(), draw.uniform(0.02, 0.8) * seconds
    while process.poll() is None and time.monotonic() - began < moment:
      time.sleep(0.02)
    ended = time.monotonic() - began
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    if process.returncode == 0:
      return kills, min(seconds, ended)
    assert process.returncode == -signal.SIGKILL, error.decode()
    kills += 1
  last = start(run_dir)
  _, error = last.communicate()
  assert last.returncode == 0, error.decode()
  return kills, seconds
