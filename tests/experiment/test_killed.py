"""Runs that are killed with SIGKILL, really, again and again: they end as the undisturbed run, to the bit.

CQD_KILLS sets how many random kills there are besides the aimed ones; 3 by default, since each costs a start of Python.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from experiment_cases import needs_sandbox, tiny_settings

from cqd_jax.config import EvolutionSettings, OutputSettings, dump_settings

pytestmark = needs_sandbox

NUM_RANDOM_KILLS = int(os.environ.get("CQD_KILLS", "3"))


def start(*arguments):
  command = [sys.executable, "-W", "ignore", "-m", "cqd_jax.cli", *map(str, arguments)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
  output, _ = process.communicate(timeout=300)
  return process.returncode, output


def killed_when(process, is_moment, run_dir):
  """Kills the process at a moment, or returns False if it ended before. Stopped first, so that the moment is exact."""
  while process.poll() is None:
    if is_moment(run_dir):
      process.send_signal(signal.SIGSTOP)
      if is_moment(run_dir):
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
      process.send_signal(signal.SIGCONT)
    time.sleep(0.0005)
  process.communicate()
  return False


def writing_history(run_dir):
  return (run_dir / "history.sqlite-journal").exists()


def writing_checkpoint(run_dir):
  return any(run_dir.glob("checkpoints/*.orbax-checkpoint-tmp"))


def after(seconds):
  """A moment so many seconds after it is first looked at."""
  end = []

  def is_moment(run_dir):
    end.append(time.monotonic() + seconds)
    return time.monotonic() > end[0]

  return is_moment


def where(run_dir):
  """How far a run is, for a person: the last batch in the history, and what was being written."""
  if not (run_dir / "history.sqlite").exists():
    return "training"
  connection = sqlite3.connect(f"file:{run_dir}/history.sqlite?mode=ro", uri=True)
  try:
    (batch,) = connection.execute("SELECT max(batch) FROM batches").fetchone()
    (evaluations,) = connection.execute("SELECT count(*) FROM evaluations").fetchone()
  except sqlite3.OperationalError:  # a hot journal, which a reader may not roll back
    batch = evaluations = "?"
  finally:
    connection.close()
  doing = [word for word, is_so in (("history", writing_history), ("checkpoint", writing_checkpoint)) if is_so(run_dir)]
  return f"batch {batch}, evaluation {evaluations}{', writing ' + ' and '.join(doing) if doing else ''}"


def rows_of(run_dir):
  """All that the history tells, without times."""
  connection = sqlite3.connect(run_dir / "history.sqlite")
  people = [row[:7] + row[8:] for row in connection.execute("SELECT * FROM individuals ORDER BY identity")]
  batches = connection.execute("SELECT batch, metrics FROM batches ORDER BY batch").fetchall()
  evaluations = connection.execute("SELECT split, models, passed FROM evaluations ORDER BY split, models").fetchall()
  connection.close()
  return people, batches, evaluations


def arrays_of(run_dir):
  """The last checkpoint, as Orbax alone reads it."""
  with ocp.CheckpointManager((run_dir / "checkpoints").absolute()) as manager:
    step = manager.latest_step()
    return step, manager.restore(step, args=ocp.args.StandardRestore())


def assert_same_run(one, other):
  for ours, theirs in zip(rows_of(one), rows_of(other), strict=True):
    assert ours == theirs
  (step, arrays), (other_step, others) = arrays_of(one), arrays_of(other)
  assert step == other_step
  assert arrays.keys() == others.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(np.asarray(array), np.asarray(others[name]), err_msg=name)
  assert (one / "table.md").read_text() == (other / "table.md").read_text()
  results = [json.loads((run / "scores.json").read_text()) for run in (one, other)]
  for name in ("test", "best", "aggregated", "samples"):
    assert results[0][name] == results[1][name]
  for folder in (one / "models").iterdir():
    assert (folder / "params.safetensors").read_bytes() == (
      other / "models" / folder.name / "params.safetensors"
    ).read_bytes()
  assert not [path for path in other.rglob("*") if path.name.endswith(("orbax-checkpoint-tmp", "-journal"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """(config file, run directory, seconds) of a run that nobody killed."""
  folder = tmp_path_factory.mktemp("undisturbed")
  config = folder / "tiny.yaml"
  settings = tiny_settings(
    folder, evolution=EvolutionSettings(children=24, batch_size=3, cells=4), output=OutputSettings(checkpoint_every=2)
  )
  config.write_text(dump_settings(settings))
  began = time.monotonic()
  code, output = finish(start("evolve", config, "--run-dir", folder / "run"))
  assert code == 0, output
  return config, folder / "run", time.monotonic() - began


def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(undisturbed, tmp_path):
  config, reference, seconds = undisturbed
  run_dir = tmp_path / "run"
  chance = random.Random(0)
  moments = [writing_history, writing_checkpoint]
  moments += [after(chance.uniform(0.2, 0.9) * seconds) for _ in range(NUM_RANDOM_KILLS)]
  kills = []
  for number, moment in enumerate(moments):
    if (run_dir / "run.json").exists():
      process = start("resume", run_dir)
    else:
      if run_dir.exists():  # killed before it was a run
        run_dir.rename(tmp_path / f"stillborn-{number}")
      # A cache of its own, so that the training is done again, and killed.
      process = start("evolve", config, "--run-dir", run_dir, "--cache-dir", tmp_path / "cache")
    if killed_when(process, moment, run_dir):
      kills.append(where(run_dir))
  code, output = finish(start("resume", run_dir))
  assert code == 0, output
  print(f"{len(kills)} kills at {len(set(kills))} places: {kills}")
  assert len(kills) >= 2
  assert_same_run(reference, run_dir)
