"""Going on with a run: after a stop, from a damaged checkpoint, without its history; and when it must not go on."""

import contextlib
import dataclasses
import json
import shutil
import sys
import warnings

import jax
import numpy as np
import pytest
from experiment_cases import load_model, needs_sandbox, task_arithmetic, tiny_evolution, tiny_settings
from rich.console import Console

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import OutputSettings, dump_settings, load_settings
from cqd_jax.hub.save import save_pretrained
from cqd_jax.models import DecoderConfig, init_params
from cqd_jax.run import experiment as run
from cqd_jax.run import files as run_files
from cqd_jax.run import text_run
from cqd_jax.run.commands import aggregate, evaluate, plot, report
from cqd_jax.run.experiment import resume_experiment, run_experiment
from cqd_jax.run.files import open_run
from cqd_jax.run.read_run import read_record
from cqd_jax.store.history import History
from cqd_jax.store.run_dir import RunDirError, locked
from cqd_jax.terminal.interrupt import Interrupt, Stopped

pytestmark = [
  needs_sandbox,
  # TensorStore calls back into a reading that Orbax has given up because of an error: nobody's fault here.
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  # Experts this small may all fail one task; the grid says so.
  pytest.mark.filterwarnings("ignore:task .* all experts score 0"),
]

QUIET = Console(quiet=True)


class StopAfter(Interrupt):
  """Asks to stop once so many batches are in the history, as a signal would."""

  def __init__(self, history, batches):
    self._history, self._batches = history, batches

  @property
  def requested(self):
    if not self._history.is_file():
      return False
    with History(self._history) as history:
      return history.num_batches("CycleQD") > self._batches


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """(settings, folder, run directory) of a run that was asked to stop after batch 3 of 4; a checkpoint every batch."""
  folder = tmp_path_factory.mktemp("resume")
  settings = tiny_settings(
    folder,
    evolution=tiny_evolution(children=12),
    methods=(task_arithmetic(0.5),),
    output=OutputSettings(checkpoint_every=1, elites="best"),
  )
  run_dir = folder / "runs" / "skills-seed-0"
  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="task .* all experts score 0")
    stop = StopAfter(run_dir / "history.sqlite", 3)
    patch.setattr(run, "interruptible", lambda announce: contextlib.nullcontext(stop))
    with pytest.raises(Stopped, match=f"nothing scored is lost; go on with: cqd resume {run_dir}"):
      run_experiment(settings, QUIET)
  return settings, folder, run_dir


@pytest.fixture(scope="module")
def reference(stopped):
  """The result of going on, without any mishap, in a copy of the run directory."""
  _, folder, run_dir = stopped
  shutil.copytree(run_dir, folder / "reference")
  return resume_experiment(folder / "reference", QUIET)


@pytest.fixture
def copy(stopped, tmp_path):
  """A copy of the stopped run."""
  shutil.copytree(stopped[2], tmp_path / "run")
  return tmp_path / "run"


def same(result, reference):
  assert result.rows == reference.rows
  histories = []
  for run_dir in (result.run_dir, reference.run_dir):
    with History(run_dir / "history.sqlite") as history:
      histories.append(dataclasses.asdict(history.individuals("CycleQD")))
  for name in ("born", "parents", "scores", "taken"):
    np.testing.assert_array_equal(histories[0][name], histories[1][name])
  return True


def test_a_stop_leaves_a_checkpoint_and_a_history_of_whole_batches(stopped):
  _, _, run_dir = stopped
  assert sorted(path.name for path in (run_dir / "checkpoints" / "cycleqd").iterdir()) == ["1", "2", "3"]
  with History(run_dir / "history.sqlite") as history:
    assert history.num_batches("CycleQD") == 4
  assert not (run_dir / "scores.json").exists()


def test_it_goes_on_without_asking_a_question_twice(copy, reference, monkeypatch):
  asked = []
  remember = History.remember

  def count(self, split, problem, evaluations, seconds):
    asked.extend((split, problem, individual) for individual in evaluations)
    remember(self, split, problem, evaluations, seconds)

  monkeypatch.setattr(History, "remember", count)
  with History(copy / "history.sqlite") as history:
    known = set(history._connection.execute("SELECT split, problem, individual FROM evaluations"))
  result = resume_experiment(copy, QUIET)
  assert same(result, reference)
  assert len(known) == 3 + 9  # the experts, and three batches of three children
  assert not known & set(asked)
  assert len(set(asked)) == len(asked)
  facts = json.loads((copy / "run.json").read_text())
  assert len(facts["sessions"]) == 2


@pytest.mark.soak
@pytest.mark.usefixtures("collected")
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(copy, reference):
  for file in (copy / "checkpoints" / "cycleqd" / "3").rglob("*"):
    if file.is_file() and file.stat().st_size > 100:
      content = bytearray(file.read_bytes())
      content[len(content) // 2 :] = b"\x00" * (len(content) - len(content) // 2)
      file.write_bytes(content)
  with pytest.warns(UserWarning, match=r"checkpoints/cycleqd/3: .*damaged.*; going back to the checkpoint before it"):
    result = resume_experiment(copy, QUIET)
  assert same(result, reference)


@pytest.mark.soak
def test_without_any_checkpoint_it_begins_with_the_experts_and_remembers_all_scores(copy, reference):
  shutil.rmtree(copy / "checkpoints")
  assert same(resume_experiment(copy, QUIET), reference)


@pytest.mark.soak
def test_without_a_history_it_is_made_anew(copy, reference):
  (copy / "history.sqlite").unlink()
  with pytest.warns(UserWarning, match="ahead of the history, which ends at 0; not used"):
    result = resume_experiment(copy, QUIET)
  assert same(result, reference)


@pytest.mark.soak
def test_a_lost_cache_is_no_loss_since_the_run_has_its_own_experts(stopped, copy, reference, monkeypatch):
  monkeypatch.chdir(copy)  # another working directory
  monkeypatch.setattr(text_run, "load_or_train", None)
  assert same(resume_experiment(copy, QUIET), reference)


@pytest.mark.soak
def test_an_aggregate_of_the_run_so_far_is_not_taken_for_that_of_its_end(copy, reference):
  folder = aggregate(copy, None, QUIET)
  assert folder.name == "aggregate-after-9-children"
  assert load_model(folder)[1]["children"] == 9
  result = resume_experiment(copy, QUIET)
  assert same(result, reference)
  assert load_model(copy / "models" / "aggregate")[1]["children"] == 12
  with pytest.raises(RunDirError, match="models/aggregate: already exists"):
    aggregate(copy, None, QUIET)
  elsewhere = aggregate(copy, copy / "merged", QUIET)
  for ours, theirs in zip(
    *(jax.tree.leaves(load_model(path)[0]) for path in (elsewhere, copy / "models" / "aggregate")), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_a_report_of_an_unfinished_run_tells_how_far_it_is(copy):
  record = read_record(open_run(copy))
  assert not record.finished
  assert len(record.individuals) == 3 + 9
  assert record.rows == []
  assert record.best in {holder for k in range(3) for holder in record.elites(k).values()}
  report(copy, copy / "so-far.html", QUIET)
  assert "in progress" in (copy / "so-far.html").read_text()
  assert len(plot(copy, None, ["svg"], QUIET)) >= 4


def test_a_model_that_is_not_there_or_of_another_shape_is_named(copy):
  with pytest.raises(RunDirError, match=r"no 'best' in .*models, which has base, expert-coding, expert-database"):
    evaluate(copy, "best", "test", QUIET)
  config = DecoderConfig(8, 4, 8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2)
  save_pretrained(copy / "models" / "odd", init_params(jax.random.key(0), config), config)
  with pytest.raises(RunDirError, match="odd: is a model of another shape"):
    evaluate(copy, "odd", "test", QUIET)


@pytest.mark.parametrize("missing", ["kind", "settings", "sessions", "seconds"])
def test_a_damaged_run_json_is_told(copy, missing):
  facts = json.loads((copy / "run.json").read_text())
  facts[missing] = []
  (copy / "run.json").write_text(json.dumps(facts))
  with pytest.raises(RunDirError, match=rf"run\.json: damaged, '{missing}': "):
    resume_experiment(copy, QUIET)


def test_damaged_results_are_told(reference, tmp_path):
  shutil.copytree(reference.run_dir, tmp_path / "run")
  (tmp_path / "run" / "scores.json").write_text("{}")
  with pytest.raises(RunDirError, match=r"scores\.json: damaged, .*; delete it and make it again with: cqd resume"):
    resume_experiment(tmp_path / "run", QUIET)


def test_a_run_directory_appears_whole_or_not_at_all(stopped, tmp_path, monkeypatch):
  settings = dataclasses.replace(stopped[0], run_dir=tmp_path / "deep" / "mine")

  def full(path, content):
    raise OSError("no space")

  with monkeypatch.context() as patch:
    patch.setattr(run_files, "write_json", full)
    with pytest.raises(OSError, match="no space"):
      run_files.create_run(settings)
  assert not list((tmp_path / "deep").iterdir())
  files = run_files.create_run(settings)
  assert sorted(path.name for path in files.path.iterdir()) == ["config.yaml", "run.json"]
  assert load_settings(files.settings).run_dir is None  # so that it can begin another run


def test_a_finished_run_is_shown_again(reference, tmp_path):
  run_dir = tmp_path / "finished"
  shutil.copytree(reference.run_dir, run_dir)
  (run_dir / "report.html").unlink()
  again = resume_experiment(run_dir, QUIET)
  assert again.rows == reference.rows
  assert (run_dir / "report.html").is_file()


def test_a_run_in_use_is_refused(copy):
  before = (copy / "run.json").read_bytes()
  with locked(copy), pytest.raises(RunDirError, match="in use by process"):
    resume_experiment(copy, QUIET)
  assert (copy / "run.json").read_bytes() == before


def test_settings_that_were_changed_since_are_named(stopped, copy):
  settings = stopped[0]
  changed = dataclasses.replace(
    settings, evolution=dataclasses.replace(settings.evolution, mutation=Plug("svd", {"max_scale": 2.0})), seed=3
  )
  (copy / "config.yaml").write_text(dump_settings(changed))
  with pytest.raises(
    ValueError, match=r"seed is 3 and was 0, evolution\.mutation is .*'svd'.* and was None.*begin another"
  ):
    resume_experiment(copy, QUIET)


@pytest.mark.soak
def test_settings_that_change_no_result_may_be_changed_and_a_missing_file_is_no_loss(stopped, copy, reference):
  settings = dataclasses.replace(stopped[0], workers=2, output=OutputSettings(checkpoint_every=2, tensorboard=False))
  (copy / "config.yaml").write_text(dump_settings(settings))
  assert same(resume_experiment(copy, QUIET), reference)
  (copy / "config.yaml").unlink()
  (copy / "scores.json").unlink()
  with pytest.warns(UserWarning, match="is missing; the settings with which the run began are used"):
    resume_experiment(copy, QUIET)


@pytest.mark.soak
def test_another_version_of_a_library_is_told(copy):
  facts = json.loads((copy / "run.json").read_text())
  facts["sessions"][0]["versions"]["jax"] = "0.1"
  (copy / "run.json").write_text(json.dumps(facts))
  with pytest.warns(UserWarning, match="versions were .*'jax': '0.1'.*results may differ by rounding"):
    resume_experiment(copy, QUIET)


def test_a_directory_that_is_no_run_or_of_another_format_is_named(tmp_path):
  with pytest.raises(RunDirError, match="nowhere: no such run directory"):
    resume_experiment(tmp_path / "nowhere", QUIET)
  with pytest.raises(RunDirError, match=r"not a run directory \(it has no run.json\)"):
    resume_experiment(tmp_path, QUIET)
  (tmp_path / "run.json").write_text('{"format": 99}')
  with pytest.raises(RunDirError, match="expected a run of format 3"):
    resume_experiment(tmp_path, QUIET)


def test_a_run_directory_of_ones_own_choice_is_not_overwritten(stopped, tmp_path):
  (tmp_path / "mine").mkdir()
  settings = dataclasses.replace(stopped[0], run_dir=tmp_path / "mine")
  with pytest.raises(RunDirError, match="mine: already exists; nothing was overwritten"):
    run_experiment(settings, QUIET)
  assert not list((tmp_path / "mine").iterdir())


def test_a_task_that_changed_since_is_refused_by_name(copy, monkeypatch):
  """Its grader judges by other inputs: scores that were kept would be of another task."""
  monkeypatch.setattr(sys.modules["cqd_jax.tasks.skills.coding"], "INPUTS", [[1, 2, 3]])
  with pytest.raises(RunDirError, match=r"run: coding changed since the run began \(validation split"):
    resume_experiment(copy, QUIET)


@pytest.mark.soak
def test_another_mesh_is_no_other_run_but_is_reported(copy, reference):
  facts = json.loads((copy / "run.json").read_text())
  facts["settings"]["mesh"] = {"population": 2, "model": 1}
  (copy / "run.json").write_text(json.dumps(facts))
  with pytest.warns(UserWarning, match=r"the mesh was 2 x 1 and is 1 x 1; results may differ by rounding"):
    assert same(resume_experiment(copy, QUIET), reference)
