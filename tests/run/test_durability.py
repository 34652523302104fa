"""Runs that are killed with SIGKILL, really, again and again: they end as the undisturbed run, to the bit.

CQD_KILLS sets how many kills there are of each kind; 1 by default, since each costs a start of the program.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from experiment_cases import cma_es, needs_sandbox, task_arithmetic, tiny_evolution, tiny_settings

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import OutputSettings, dump_settings

pytestmark = [needs_sandbox, pytest.mark.soak]

LONG = "CQD_LONG" in os.environ
NUM_KILLS = int(os.environ.get("CQD_KILLS", "1"))


def start(*arguments):
  command = [sys.executable, "-W", "ignore", "-m", "cqd_jax.cli", *map(str, arguments)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
  output, _ = process.communicate(timeout=1200)
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
  return any(run_dir.glob("checkpoints/*/*.orbax-checkpoint-tmp"))


def nth(condition, times):
  """A moment at which a condition has come true so often; one that comes and goes unseen does not count."""
  seen = [False, 0]

  def is_moment(run_dir):
    true = condition(run_dir)
    seen[1] += true and not seen[0]
    seen[0] = true
    return true and seen[1] >= times

  return is_moment


def then(moment, seconds):
  """So many seconds after another moment."""
  end = []

  def is_moment(run_dir):
    if not end and moment(run_dir):
      end.append(time.monotonic() + seconds)
    return bool(end) and time.monotonic() > end[0]

  return is_moment


def at_start(run_dir):
  """At once."""
  return True


def moments_to_kill():
  """While it trains, writes the history, a checkpoint, and in between: while it evaluates; and in every method."""
  chance = random.Random(0)
  for _ in range(NUM_KILLS):
    yield then(at_start, chance.uniform(2, 12))
    yield nth(writing_checkpoint, chance.randint(1, 2))
    if LONG:
      yield then(nth(writing_history, chance.randint(1, 4)), chance.uniform(0, 1))
      yield nth(writing_history, chance.randint(1, 8))
    yield in_method("CMA-ES, per kernel", chance.randint(1, 2))
    yield in_method("NSGA-II", chance.randint(1, 2))


def ask_history(run_dir, query):
  """One row of the history, as it is on disk; None if it cannot be read now."""
  if not (run_dir / "history.sqlite").exists():
    return None
  connection = sqlite3.connect(f"file:{run_dir}/history.sqlite?mode=ro", uri=True)
  try:
    return connection.execute(query).fetchone()
  except sqlite3.OperationalError:  # a hot journal, which a reader may not roll back
    return None
  finally:
    connection.close()


def where(run_dir):
  """How far a run is, for a person: the method, its last batch, and what was being written."""
  if not (run_dir / "history.sqlite").exists():
    return "training"
  method, batch = ask_history(run_dir, "SELECT method, batch FROM batches ORDER BY written_at DESC") or ("?", "?")
  (evaluations,) = ask_history(run_dir, "SELECT count(*) FROM evaluations") or ("?",)
  doing = [word for word, is_so in (("history", writing_history), ("checkpoint", writing_checkpoint)) if is_so(run_dir)]
  return f"{method} {batch}, evaluation {evaluations}{', writing ' + ' and '.join(doing) if doing else ''}"


def in_method(name, batch):
  """A method has come to a batch."""
  query = f"SELECT max(batch) FROM batches WHERE method = '{name}'"
  return lambda run_dir: ((ask_history(run_dir, query) or (None,))[0] or 0) >= batch


def rows_of(run_dir):
  """All that the history tells, without times."""
  connection = sqlite3.connect(run_dir / "history.sqlite")
  people = [row[:8] + row[9:] for row in connection.execute("SELECT * FROM individuals ORDER BY method, identity")]
  batches = connection.execute("SELECT method, batch, metrics FROM batches ORDER BY method, batch").fetchall()
  evaluations = connection.execute(
    "SELECT split, problem, individual, scored, answers, samples, turns, prompt_tokens, answer_tokens, transcripts "
    "FROM evaluations ORDER BY split, individual"
  ).fetchall()
  texts = connection.execute("SELECT * FROM texts ORDER BY digest").fetchall()
  connection.close()
  return people, batches, evaluations, texts


def arrays_of(folder):
  """The last checkpoint of a method, as Orbax alone reads it."""
  with ocp.CheckpointManager(folder.absolute()) as manager:
    step = manager.latest_step()
    return step, manager.restore(step, args=ocp.args.StandardRestore())


def assert_same_run(one, other):
  for ours, theirs in zip(rows_of(one), rows_of(other), strict=True):
    assert ours == theirs
  folders = sorted(path.name for path in (one / "checkpoints").iterdir())
  assert folders == sorted(path.name for path in (other / "checkpoints").iterdir())
  for folder in folders:
    (step, arrays), (other_step, others) = (arrays_of(run / "checkpoints" / folder) for run in (one, other))
    assert step == other_step
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
      np.testing.assert_array_equal(np.asarray(array), np.asarray(others[name]), err_msg=f"{folder} {name}")
  assert (one / "table.md").read_text() == (other / "table.md").read_text()
  results = [json.loads((run / "scores.json").read_text()) for run in (one, other)]
  for name in ("test", "best", "aggregated", "samples"):
    assert results[0][name] == results[1][name]
  for folder in (one / "models").iterdir():
    assert (folder / "model.safetensors").read_bytes() == (
      other / "models" / folder.name / "model.safetensors"
    ).read_bytes()
  assert not [path for path in other.rglob("*") if path.name.endswith(("orbax-checkpoint-tmp", "-journal"))]


def run_undisturbed(folder, **changes):
  """(config file, run directory) of a run that nobody killed."""
  config = folder / "tiny.yaml"
  output = OutputSettings(checkpoint_every=2)
  settings = tiny_settings(folder, cache_dir=folder / "cache", output=output, **changes)  # trained as those to compare
  config.write_text(dump_settings(settings))
  code, output = finish(start("evolve", config, "--run-dir", folder / "run"))
  assert code == 0, output
  return config, folder / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Of CycleQD alone."""
  return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), evolution=tiny_evolution(children=12), methods=())


@pytest.fixture(scope="module")
def undisturbed_methods(tmp_path_factory):
  """Of every kind of method."""
  folder = tmp_path_factory.mktemp("undisturbed-methods")
  methods = (task_arithmetic(0.5), cma_es("kernel", batch_size=4), Plug("nsga2", {"population_size": 8}))
  evolution = tiny_evolution(children=24 if NUM_KILLS == 1 else 240)
  return run_undisturbed(folder, evolution=evolution, methods=methods)


def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(undisturbed_methods, tmp_path):
  config, reference = undisturbed_methods
  run_dir = tmp_path / "run"
  kills = []
  for moment in moments_to_kill():
    if run_dir.exists():
      process = start("resume", run_dir)
    else:
      process = start("evolve", config, "--run-dir", run_dir, "--cache-dir", tmp_path / "cache")
    if killed_when(process, moment, run_dir):
      kills.append(where(run_dir))
  code, output = finish(start("resume", run_dir))
  assert code == 0, output
  print(f"{len(kills)} kills at {len(set(kills))} places: {kills}")
  assert len(kills) >= 3 * NUM_KILLS
  for method in ("CMA-ES", "NSGA-II"):
    assert any(kill.startswith(method) for kill in kills)
  assert_same_run(reference, run_dir)


def begun(run_dir):
  """A batch of children is in the history."""
  return where(run_dir).startswith(("CycleQD 1", "CycleQD 2"))


@pytest.mark.long
def test_ctrl_c_ends_a_run_after_the_iteration_at_hand(undisturbed, tmp_path):
  config, reference = undisturbed
  run_dir = tmp_path / "run"
  process = start("evolve", config, "--run-dir", run_dir)
  while process.poll() is None and not begun(run_dir):
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  code, output = finish(process)
  assert code == 130, output
  assert "stopping at the next safe point" in output
  assert f"cqd: stopped; nothing scored is lost; go on with: cqd resume {run_dir}" in output
  assert "Traceback" not in output
  assert list((run_dir / "checkpoints" / "cycleqd").iterdir())
  code, output = finish(start("resume", run_dir))
  assert code == 0, output
  assert_same_run(reference, run_dir)


FULL_DISK = """
set -e
mount -t tmpfs -o size={size} tmpfs {disk}
set +e
{evolve}; echo "exit code $?"
mount -o remount,size=1g {disk}
{resume}; echo "exit code $?"
cp -r {disk}/run {out}
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare to mount a small disk in")
@pytest.mark.long
@pytest.mark.parametrize("size", ["200k", "9m"])
def test_a_full_disk_is_one_line_and_nothing_is_lost(request, tmp_path, size):
  """On a real small disk: 200k holds no history for long, 9m no checkpoint. It gets larger, and the run goes on."""
  config, reference = request.getfixturevalue("undisturbed" if size == "200k" else "undisturbed_methods")
  namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
  if subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode:
    pytest.skip("nothing may be mounted here")
  disk = tmp_path / "disk"
  disk.mkdir()
  cqd = f"{sys.executable} -W ignore -m cqd_jax.cli"
  script = FULL_DISK.format(
    size=size,
    disk=disk,
    evolve=f"{cqd} evolve {config} --run-dir {disk}/run",
    resume=f"{cqd} resume {disk}/run",
    out=tmp_path / "out",
  )
  command = [*namespace, "sh", "-c", script]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  output = done.stdout + done.stderr
  assert [line for line in done.stdout.splitlines() if line.startswith("exit code")] == [
    "exit code 2",
    "exit code 0",
  ], output
  advice = (
    f"{disk}/run: no space left on its disk; free some, nothing scored is lost; go on with: cqd resume {disk}/run"
  )
  assert done.stderr.count(f"cqd: {advice}") == 1, output
  assert "Traceback" not in output
  assert_same_run(reference, tmp_path / "out")
