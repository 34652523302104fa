"""A run of every kind of method on the toy problem, killed with SIGKILL at random points until it is through.

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
from loop_cases import METHODS, told

pytestmark = pytest.mark.soak
KILLS = int(os.environ.get("CQD_KILLS", "4"))

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


def start(run_dir, budget):
  cases = str(Path(__file__).parents[1] / "run")
  program = PROGRAM.format(cases=cases, run_dir=str(run_dir), budget=budget)
  return subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


def test_it_ends_as_the_undisturbed_run(tmp_path):
  budget, draw, kills = 16 + 4 * KILLS, random.Random(0), 0
  undisturbed = start(tmp_path / "reference", budget)
  began = time.monotonic()
  _, error = undisturbed.communicate()
  seconds = time.monotonic() - began
  assert undisturbed.returncode == 0, error.decode()
  run_dir = tmp_path / "run"
  while kills < KILLS:
    process = start(run_dir, budget)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(draw.uniform(0.05, 0.6) * seconds)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    if process.returncode == 0:
      break
    assert process.returncode == -signal.SIGKILL, error.decode()
    kills += 1
  last = start(run_dir, budget)
  _, error = last.communicate()
  assert last.returncode == 0, error.decode()
  print(f"{kills} kills")
  assert kills >= min(KILLS, 3)
  names = ["CycleQD", "CMA-ES", "NSGA-II", "random search", "task arithmetic"]
  assert len(names) == len(METHODS)
  methods = [name for name in names if told(run_dir, name)["born"].size]
  assert methods
  for name in methods:
    for what, expected in told(tmp_path / "reference", name).items():
      assert repr(told(run_dir, name)[what]) == repr(expected), (name, what)
  assert (run_dir / "table.md").read_text() == (tmp_path / "reference" / "table.md").read_text()
