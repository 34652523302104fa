"""The table over seeds: means and standard errors worked out by hand."""

import dataclasses

import pytest
from experiment_cases import load_script

from cqd_jax.config.settings import ExperimentSettings
from cqd_jax.run.files import create_run
from cqd_jax.run.seeds import find_run


@pytest.fixture
def seeds(pytestconfig):
  return load_script(pytestconfig.rootpath / "experiments" / "skills.py")


def result(seed, score, solved):
  row = {"name": "m", "scores": {"a": score, "b": 0.5}, "mean": (score + 0.5) / 2, "minimum": 0.5, "solved": solved}
  return {"tasks": ["a", "b"], "seed": seed, "test": [row]}


def test_means_and_standard_errors(seeds):
  # 0.6, 0.7, 0.8: mean 0.7, standard deviation 0.1, standard error 0.1 / sqrt(3) = 0.0577
  text = seeds.seeds_markdown([result(0, 0.6, {"3": 0.9}), result(1, 0.7, {"3": 0.9}), result(2, 0.8, {"3": 0.9})])
  lines = text.splitlines()
  assert lines[0] == "| model | a | b | mean | min | any 3 |"
  assert lines[2] == "| m | .700 ±.058 | .500 ±.000 | .600 ±.029 | .500 ±.000 | .900 ±.000 |"


def test_one_seed_has_no_error_and_a_method_without_members_no_share(seeds):
  text = seeds.seeds_markdown([result(0, 1.0, {})])
  assert text.splitlines()[2] == "| m | 1.000 | .500 | .750 | .500 |"


def test_the_run_of_a_seed_is_found_finished_or_not(tmp_path):
  settings = ExperimentSettings(runs_dir=tmp_path)
  assert find_run(settings) is None
  other = create_run(dataclasses.replace(settings, max_new_tokens=7))
  assert find_run(settings) is None
  first, second = create_run(settings), create_run(settings)
  assert other.path.name == "skills-seed-0"
  assert find_run(settings) == first.path
  second.scores.write_text("{}")
  assert find_run(settings) == second.path
