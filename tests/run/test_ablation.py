"""The ablation: its table worked out by hand, and two rungs of the ladder really run, stopped, and gone on with."""

import pytest
from experiment_cases import load_script, needs_sandbox, tiny_settings
from rich.console import Console

from cqd_jax.config.settings import BaselineSettings, EvolutionSettings
from cqd_jax.run import ablation
from cqd_jax.run.experiment import resume_experiment
from cqd_jax.run.seeds import paired, with_error

FULL = ablation.FULL


@pytest.fixture
def script(pytestconfig):
  return load_script(pytestconfig.rootpath / "experiments" / "skills_ablation.py")


def test_means_errors_and_differences():
  assert with_error([]) == ""
  assert with_error([0.25]) == ".250"
  assert with_error([1.0, 1.0]) == "1.000 ±.000"
  # 0.6, 0.7, 0.8: standard deviation 0.1, standard error 0.1 / sqrt(3)
  assert with_error([0.6, 0.7, 0.8]) == ".700 ±.058"
  assert with_error([-0.1, 0.0], signed=True) == "-.050 ±.050"
  assert with_error([0.1], signed=True) == "+.100"
  assert paired({0: 0.5, 1: 0.75, 2: 1.0}, {0: 0.25, 1: 0.25}) == [0.25, 0.5]


def test_the_table_over_seeds(script):
  def row(name, mean, **more):
    return {"name": name, "mean": mean, "minimum": mean / 2, "solved": {"3": 0.5}, **more}

  rows = {
    0: [row("other", 0.5, aggregate=0.25), row(FULL, 0.75, aggregate=0.5), row("search", 0.875)],
    1: [row("other", 0.75, aggregate=0.25), row(FULL, 0.75, aggregate=0.5), row("search", 0.875)],
  }
  header, table = script.ablation_rows(rows)
  assert header == ["method", "mean", "min", "any 3", "aggregate", "mean less CycleQD's"]
  # the difference: -.25 and 0: mean -.125, standard deviation .177, standard error .125
  assert table[0] == ["other", ".625 ±.125", ".312 ±.062", ".500 ±.000", ".250 ±.000", "-.125 ±.125"]
  assert table[1] == [FULL, ".750 ±.000", ".375 ±.000", ".500 ±.000", ".500 ±.000", ""]
  assert table[2] == ["search", ".875 ±.000", ".438 ±.000", ".500 ±.000", "", "+.125 ±.000"]


def test_every_rung_is_the_one_before_with_a_change():
  rungs = list(ablation.LADDER.values())
  settings = EvolutionSettings()
  assert len({tuple(sorted({**rungs[1], **rung}.items())) for rung in rungs}) == len(rungs)
  for rung in rungs:
    assert set(rung) <= set(EvolutionSettings.__dataclass_fields__)
  assert (settings.selection, settings.mutation, settings.mutation_size) == tuple(
    ablation.LADDER[FULL][name] for name in ("selection", "mutation", "mutation_size")
  )


@needs_sandbox
@pytest.mark.filterwarnings("ignore:task .* all experts score 0")
def test_a_seed_is_run_once_and_refused_with_other_settings(tmp_path, monkeypatch):
  names = ["QD, fixed axes", FULL]
  monkeypatch.setattr(ablation, "LADDER", {name: ablation.LADDER[name] for name in names})
  settings = tiny_settings(tmp_path, evolution=EvolutionSettings(children=4, batch_size=2, cells=4))
  evolved = []
  run = ablation.Evolution.run
  monkeypatch.setattr(ablation.Evolution, "run", lambda self: evolved.append(self) or run(self))
  with (tmp_path / "log").open("w") as log:
    first = ablation.run_seed(settings, tmp_path / "seed-0", Console(file=log))
    again = ablation.run_seed(settings, tmp_path / "seed-0", Console(file=log))
  searches = ["random search, per model", "CMA-ES, per model", "CMA-ES, per kernel", "NSGA-II, per model"]
  assert [row["name"] for row in first] == names + searches
  assert {row["evaluations"] for row in first} == {4}
  assert all(("aggregate" in row) == (row["name"] in names) for row in first)
  assert len(evolved) == 2
  assert again == first
  assert not list((tmp_path / "seed-0").glob("*/checkpoints/*"))
  with pytest.raises(ValueError, match="is a rung of an ablation; go on with it by the command that began it"):
    resume_experiment(tmp_path / "seed-0" / "searches", Console(quiet=True))
  other = tiny_settings(tmp_path, evolution=EvolutionSettings(children=6, batch_size=2, cells=4))
  with pytest.raises(ValueError, match=r"was run with other settings \(evolution\.children\); name another --out"):
    ablation.run_seed(other, tmp_path / "seed-0", Console(quiet=True))
  assert BaselineSettings().nsga2_model is False  # the quick start goes without
