"""The ablation: a list of methods, its table worked out by hand, and two of its rungs really run and gone on with."""

import dataclasses
import json

import pytest
from experiment_cases import load_script, needs_sandbox, tiny_evolution, tiny_settings
from rich.console import Console

from cqd_jax.config.settings import load_settings
from cqd_jax.run.loop import Loop
from cqd_jax.run.methods import methods_of
from cqd_jax.run.seeds import paired, run_or_resume, with_error


@pytest.fixture
def script(pytestconfig):
  return load_script(pytestconfig.rootpath / "experiments" / "skills_ablation.py")


@pytest.fixture
def shipped(pytestconfig):
  return load_settings(pytestconfig.rootpath / "experiments" / "skills_ablation.yaml")


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
    return {"name": name, "mean": mean, "minimum": mean / 2, "solved": {"3": 0.5}, "evaluations": 4, **more}

  def rung(name, mean, aggregate):
    return [row(f"{name}, best elite", mean), row(f"{name}, aggregate", aggregate, solved={})]

  base = {"name": "base", "mean": 0.1, "minimum": 0.0, "solved": {}, "evaluations": 0}
  rows = {
    0: [base, *rung("other", 0.5, 0.25), row("search", 0.875), *rung("CycleQD", 0.75, 0.5)],
    1: [base, *rung("other", 0.75, 0.25), row("search", 0.875), *rung("CycleQD", 0.75, 0.5)],
  }
  header, table = script.ablation_rows(rows)
  assert header == ["method", "mean", "min", "any 3", "aggregate", "mean less CycleQD's"]
  # the difference: -.25 and 0: mean -.125, standard deviation .177, standard error .125
  assert table[0] == ["other", ".625 ±.125", ".312 ±.062", ".500 ±.000", ".250 ±.000", "-.125 ±.125"]
  assert table[1] == ["search", ".875 ±.000", ".438 ±.000", ".500 ±.000", "", "+.125 ±.000"]
  assert table[2] == ["CycleQD", ".750 ±.000", ".375 ±.000", ".500 ±.000", ".500 ±.000", ""]


def test_every_rung_of_the_shipped_ladder_differs_from_the_others(shipped):
  rungs = [plug for plug in shipped.methods if plug.use == "cycleqd"]
  whole = {"mutation": {"use": "expert_svd", "rate": 0.3}}
  settings = [
    json.dumps({**whole, **{name: value for name, value in rung.settings.items() if name != "name"}}, sort_keys=True)
    for rung in rungs
  ]
  assert len({*settings, json.dumps(whole)}) == len(rungs) + 1
  assert len(methods_of(shipped)) == 1 + len(shipped.methods) == 12


@pytest.mark.soak
@pytest.mark.long
@needs_sandbox
@pytest.mark.filterwarnings("ignore:task .* all experts score 0")
def test_a_seed_is_run_once(shipped, tmp_path, monkeypatch):
  chosen = tuple(plug for plug in shipped.methods if plug.settings["name"] in ("QD, fixed axes", "NSGA-II, per model"))
  settings = tiny_settings(
    tmp_path, name="ablation", evolution=tiny_evolution(children=4, batch_size=2), methods=chosen, output=shipped.output
  )
  searched = []
  run = Loop.run
  monkeypatch.setattr(Loop, "run", lambda self: searched.append(self) or run(self))
  with (tmp_path / "log").open("w") as log:
    first = run_or_resume(settings, Console(file=log))
    again = run_or_resume(settings, Console(file=log))
  names = [row.name for row in first.rows if row.evaluations]
  assert names == [
    "QD, fixed axes, best elite",
    "QD, fixed axes, aggregate",
    "NSGA-II, per model",
    "CycleQD, best elite",
    "CycleQD, aggregate",
  ]
  assert {row.evaluations for row in first.rows if row.evaluations} == {4}
  assert len(searched) == 3
  assert again == first
  assert not list((first.run_dir / "models").glob("elite-0000*"))[1:]  # the best of all only
  other = dataclasses.replace(settings, evolution=tiny_evolution(children=2, batch_size=2), methods=())
  assert run_or_resume(other, Console(quiet=True)).run_dir != first.run_dir
