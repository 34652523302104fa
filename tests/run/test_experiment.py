"""The whole experiment at a very small size, really executed: what it writes, and that it is the same twice."""

import json
import shutil
import warnings

import jax
import matplotlib.image
import numpy as np
import pytest
from experiment_cases import load_model, needs_sandbox, tiny_evolution, tiny_settings
from rich.console import Console

from cqd_jax.cli.main import main
from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import TrainingSettings, load_settings
from cqd_jax.run.check import check
from cqd_jax.run.commands import evaluate
from cqd_jax.run.distill import distill
from cqd_jax.run.experiment import run_experiment
from cqd_jax.run.files import open_run
from cqd_jax.run.plan import dry_run
from cqd_jax.run.read_run import read_record
from cqd_jax.sandbox.sandbox import probe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Two runs of the same settings: the second finds the experts in the cache."""
  folder = tmp_path_factory.mktemp("experiment")
  with (folder / "log.txt").open("w") as log, warnings.catch_warnings():
    # Experts this small may all fail one task; the grid says so.
    warnings.filterwarnings("ignore", message="task .* all experts score 0")
    console = Console(file=log, width=120)
    results = [run_experiment(tiny_settings(folder, cache_dir=folder / "cache"), console) for _ in range(2)]
  return results, (folder / "log.txt").read_text()


@needs_sandbox
def test_a_run_scores_every_method_on_the_test_split(finished):
  (result, _), log = finished
  names = [row.name for row in result.rows]
  assert names == [
    "base",
    "expert coding",
    "expert database",
    "expert os",
    "the experts together",
    "uniform average",
    "task arithmetic, tuned scale",
    "random search, per model",
    "CMA-ES, per model",
    "CMA-ES, per kernel",
    "CycleQD, best elite",
    "CycleQD, aggregate",
  ]
  for row in result.rows:
    assert row.name in log
    if row.name == "the experts together":
      assert not row.scores
      assert row.mean is None
      assert row.solved[2] >= 0
      continue
    scores = list(row.scores.values())
    assert all(score * 8 == round(score * 8) for score in scores)
    assert row.mean == pytest.approx(np.mean(scores))
    assert row.minimum == min(scores)
  assert (
    max(row.mean for row in result.rows if row.scores) > 0.2
  )  # 40 steps taught something; two equal failures would prove little
  searched = [row for row in result.rows if "per " in row.name or "elite" in row.name]
  assert {row.evaluations for row in searched} == {6}
  assert all(set(row.solved) == {2} for row in searched)  # nobody has 50 members


@needs_sandbox
def test_a_run_directory_holds_settings_scores_table_picture_and_checkpoint(finished):
  (result, second), _ = finished
  assert result.run_dir.name == "skills-seed-0"
  assert second.run_dir.name == "skills-seed-0-2"
  content = json.loads((result.run_dir / "scores.json").read_text())
  assert [row["mean"] for row in content["test"]] == [row.mean for row in result.rows]
  assert content["seconds"].keys() == {"train", "evolve", "compare", "test", "write"}
  assert 0 < content["throughput"]["recording_share_of_evolving"] < 1
  assert (result.run_dir / "table.md").read_text().count("\n") == len(result.rows) + 2
  assert load_settings(result.run_dir / "config.yaml").evolution.children == 6
  assert matplotlib.image.imread(result.run_dir / "archives.png").shape[1] > 1000
  kept = {path.name: [step.name for step in path.iterdir()] for path in (result.run_dir / "checkpoints").iterdir()}
  assert kept == {
    "cycleqd": ["2"],
    "task-arithmetic-tuned-scale": ["2"],
    "random-search-per-model": ["2"],
    "cma-es-per-model": ["2"],
    "cma-es-per-kernel": ["2"],
  }
  assert "skills-seed-0" in (result.run_dir / "report.html").read_text()
  facts = json.loads((result.run_dir / "run.json").read_text())
  assert facts["sessions"][0]["versions"]["jax"] == jax.__version__
  assert facts["settings"]["seed"] == 0
  assert list((result.run_dir / "tensorboard" / "cycleqd").glob("events*"))


@needs_sandbox
def test_the_history_is_that_of_the_children_and_of_the_archives(finished):
  """Replaying the history by the rules of MAP-Elites in plain Python gives the archives of the checkpoint."""
  (result, _), _ = finished
  record = read_record(open_run(result.run_dir))
  people = record.individuals
  assert len(people) == 3 + 6
  assert people.born.tolist() == [0] * 3 + [1] * 3 + [2] * 3
  assert people.archive[3:].tolist() == [0] * 3 + [1] * 3
  assert (people.parents[:3] == -1).all()
  assert (people.parents[3:] >= 0).all()
  assert (people.parents[3:].max(axis=1) < np.array([3] * 3 + [6] * 3)).all()
  for individual in range(3, 9):
    np.testing.assert_allclose(people.weights(individual).sum(), 1, rtol=1e-6)
  cells = [[tuple(np.delete(bins, k)) for bins in record.bins] for k in range(3)]
  for k in range(3):
    best = {}
    for batch in range(3):
      offered = [i for i in range(len(people)) if people.born[i] == batch]
      entering = {}
      for i in offered:
        score = people.scores[i, k]
        if score > best.get(cells[k][i], (-1, None))[0] and score > entering.get(cells[k][i], (-1, None))[0]:
          entering[cells[k][i]] = (score, i)
      assert [i for i in offered if people.taken[i, k]] == sorted(i for _, i in entering.values())
      best |= entering
    assert {cell: i for cell, (_, i) in best.items()} == record.elites(k)


@needs_sandbox
def test_model_folders_are_the_models_that_were_scored(finished):
  """The best elite's folder, read and asked again, answers as the table says."""
  (result, _), _ = finished
  params, about = load_model(result.run_dir / "models" / "best")
  scores = json.loads((result.run_dir / "scores.json").read_text())
  assert about["identity"] == scores["best"]
  elites = sorted(path.name for path in (result.run_dir / "models").glob("elite-*"))
  record = read_record(open_run(result.run_dir))
  living = {identity for k in range(3) for identity in record.elites(k).values()}
  assert elites == [f"elite-{identity:06d}" for identity in sorted(living)]
  by_task = evaluate(result.run_dir, "best", "test", Console(quiet=True))
  (row,) = [row for row in result.rows if row.name == "CycleQD, best elite"]
  assert by_task == pytest.approx(row.scores)
  assert jax.tree.structure(params) == jax.tree.structure(load_model(result.run_dir / "models" / "base")[0])
  for sample in scores["samples"]:
    assert sample.keys() == {"task", "prompt", "gold", "answer", "score", "pictures", "turns", "reason"}
  passed = sum(sample["score"] for sample in scores["samples"])
  assert passed == round(sum(row.scores.values()) * 8)  # all 8 test questions per task are shown


@needs_sandbox
def test_one_model_learns_what_is_right_and_the_table_has_its_row(finished, tmp_path):
  run, console = tmp_path / "run", Console(file=(tmp_path / "log").open("w"), width=120)
  shutil.copytree(finished[0][1].run_dir, run)
  plug = Plug("distill", {"name": "taught", "labels": "references", "scales": [0.5], "steps": 2, "validate_every": 2})
  before = json.loads((run / "scores.json").read_text())["test"]
  folder = distill(run, plug, console)
  after = json.loads((run / "scores.json").read_text())["test"]
  assert after[:-1] == before
  assert (after[-1]["name"], after[-1]["evaluations"]) == ("taught", 2)
  assert evaluate(run, "taught", "test", console) == pytest.approx(after[-1]["scores"])
  assert load_model(folder)[1]["method"] == "taught"
  assert "| taught |" in (run / "table.md").read_text()
  check(run, console)
  for name, message in (("taught", "taught: already exists"), ("CycleQD", "has a method named 'CycleQD'")):
    with pytest.raises(ValueError, match=message):
      distill(run, Plug("distill", {"name": name}), console)
  console.file.close()


@needs_sandbox
def test_the_same_settings_give_the_same_run_and_reuse_the_experts(finished):
  (first, second), log = finished
  assert [row.scores for row in first.rows] == [row.scores for row in second.rows]
  assert log.count("training expert os") >= 1
  assert log.count("base and experts: from") == 1


@needs_sandbox
def test_a_damaged_expert_in_the_cache_is_named(finished, tmp_path):
  (result, _), _ = finished
  shutil.copytree(result.run_dir.parent.parent / "cache", tmp_path / "cache")
  (expert,) = (tmp_path / "cache").glob("*/os.safetensors")
  expert.write_bytes(expert.read_bytes()[:100])
  with pytest.raises(ValueError, match=r"os\.safetensors"):
    run_experiment(tiny_settings(tmp_path, cache_dir=tmp_path / "cache"), Console(quiet=True))
  assert not list((tmp_path / "runs").iterdir())  # nothing that was never begun is left behind


@needs_sandbox
def test_a_number_of_children_that_does_not_fit_the_batch_is_refused(finished, tmp_path):
  (result, _), _ = finished
  settings = tiny_settings(
    tmp_path, cache_dir=result.run_dir.parent.parent / "cache", evolution=tiny_evolution(children=7)
  )
  with pytest.raises(ValueError, match=r"evolution\.children: expected a multiple of evolution\.batch_size=3, got 7"):
    run_experiment(settings, Console(quiet=True))


@pytest.mark.parametrize("place", ["cache_dir", "runs_dir", "run_dir"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_made(tmp_path, place):
  (tmp_path / "file").write_text("no folder")
  settings = tiny_settings(tmp_path, **{place: tmp_path / "file" / "deep" / "er"})
  for run in (dry_run, run_experiment):
    with pytest.raises(ValueError, match=rf"{place}: expected a folder, got .*: {tmp_path / 'file'} is none"):
      run(settings, Console(quiet=True))
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_learning_rate_an_expert(tmp_path):
  if probe() is not None:
    pytest.skip(f"nothing isolates answers here: {probe()}")
  settings = tiny_settings(tmp_path, training=TrainingSettings(expert_learning_rates=(1e-3,)))
  with pytest.raises(ValueError, match=r"training\.expert_learning_rates: expected 3"):
    run_experiment(settings, Console(quiet=True))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["evolve"], "expected a configuration file"),
    (["evolve", "none.yaml"], r"none.yaml: no such configuration file"),
    (["train", "none.yaml"], r"none.yaml: no such configuration file"),
    (["resume", "none"], "none: no such run directory"),
    (["report", "."], "not a run directory (it has no run.json)"),
    (["plot", "none"], "none: no such run directory"),
    (["evaluate", "none"], "none: no such run directory"),
    (["aggregate", "none"], "none: no such run directory"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
  assert main(arguments) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--sed", "1"], "cqd: evolve: unknown option '--sed'; did you mean --seed?"),
    (["--evolution.childre", "3"], "unknown option '--evolution.childre'; did you mean --evolution.children?"),
    (["--evolution.mutation.rat", "3"], "evolution.mutation: expert_svd has no setting 'rat'; did you mean 'rate'?"),
    (["--zzz"], "cqd: evolve: unknown option '--zzz'; all: cqd evolve --help"),
    (["--seed", "one"], "cqd: evolve: Error parsing --seed: invalid literal for int() with base 10: 'one'"),
    (
      ["--evolution.mutation", "foo"],
      "evolution.mutation: no mutation 'foo'; there are none, gaussian, svd, expert_svd",
    ),
    (["--evolution.children", "7"], "evolution.children: expected a multiple of evolution.batch_size=4, got 7"),
  ],
)
def test_a_mistake_in_an_option_is_one_line_too(options, message, pytestconfig, tmp_path, capsys):
  config = pytestconfig.rootpath / "experiments" / "skills.yaml"
  if "children" in options[0] and probe() is not None:
    pytest.skip(f"nothing isolates answers here: {probe()}")
  assert main(["evolve", str(config), "--run-dir", str(tmp_path / "run"), *options]) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.count("\n") == 1
  assert not (tmp_path / "run").exists()


COMMANDS = ("evolve", "train", "resume", "evaluate", "aggregate", "report", "plot", "plugs")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_teaches(arguments, capsys):
  with pytest.raises(SystemExit) as caught:
    main(arguments)
  assert caught.value.code == 0
  text = capsys.readouterr().out
  assert "cqd" in text
  if arguments == ["--help"]:
    assert all(name in text for name in COMMANDS)
  if arguments[-1] == "--help":
    assert "cqd evolve experiments/skills.yaml" in text or f"cqd {arguments[0]} " in text.split("usage:", 1)[1][20:]
  if arguments == ["evolve", "--help"]:
    assert "--evolution.children" in text
    assert "Children scored in all" in text


@pytest.mark.parametrize("arguments", [["devolve"], [], ["report", "a", "b"]])
def test_an_unknown_command_or_option_is_exit_code_2(arguments, pytestconfig, monkeypatch, capsys):
  monkeypatch.chdir(pytestconfig.rootpath)
  with pytest.raises(SystemExit) as caught:
    main(arguments)
  assert caught.value.code == 2
  assert capsys.readouterr().err
