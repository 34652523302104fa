"""Settings: read back as written, overridden by dotted names, and refused by name."""

import pytest
import tyro

from cqd_jax.config.settings import (
  AT_LEAST,
  ConfigError,
  ExperimentSettings,
  changed_settings,
  check_settings,
  dump_settings,
  load_settings,
  parse_settings,
  settings_as_json,
)


def written(tmp_path, text):
  path = tmp_path / "settings.yaml"
  path.write_text(text)
  return path


def test_settings_survive_the_trip_through_yaml(tmp_path):
  settings = load_settings(written(tmp_path, "seed: 3\nevolution: {mutation: svd, mutation_size: 2}\n"))
  assert (settings.seed, settings.evolution.mutation, settings.evolution.mutation_size) == (3, "svd", 2.0)
  assert load_settings(written(tmp_path, dump_settings(settings))) == settings


def test_an_empty_file_is_all_defaults(tmp_path):
  assert load_settings(written(tmp_path, "")) == ExperimentSettings()


def test_the_shipped_experiment_is_valid(pytestconfig):
  assert load_settings(pytestconfig.rootpath / "experiments" / "skills.yaml").name == "skills"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("evolution: {childern: 3}", "unknown setting 'evolution.childern'; did you mean 'children'"),
    ("sed: 1", "unknown setting 'sed'; did you mean 'seed'"),
    ("zzzzzz: 1", "unknown setting 'zzzzzz'$"),
    ("seed: one", "seed: .*integer.*got 'one'"),
    ("evolution: {schedule: random}", r"evolution\.schedule: .*'cycle'"),
    ("evolution: 3", "evolution: "),
    ("- a list", "expected settings by name, got list"),
    ("a: [1", "not YAML"),
  ],
)
def test_a_bad_file_is_refused_by_file_and_field(tmp_path, text, message):
  with pytest.raises(ConfigError, match=message) as caught:
    load_settings(written(tmp_path, text))
  assert "settings.yaml" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ConfigError, match=r"none\.yaml: no such"):
    load_settings(tmp_path / "none.yaml")


def test_dotted_options_override_the_file(tmp_path):
  default = load_settings(written(tmp_path, "seed: 3\nevolution: {children: 10}\n"))
  settings = tyro.cli(ExperimentSettings, default=default, args=["--evolution.children", "7", "--unsafe"])
  assert (settings.seed, settings.evolution.children, settings.unsafe) == (3, 7, True)


@pytest.mark.parametrize("name", AT_LEAST)
def test_what_is_too_small_is_refused_before_anything_is_begun(name):
  content = settings_as_json(ExperimentSettings())
  *groups, last = name.split(".")
  group = content[groups[0]] if groups else content
  group[last] = AT_LEAST[name] - 1
  with pytest.raises(ConfigError, match=f"^{name}: expected at least {AT_LEAST[name]}, got {AT_LEAST[name] - 1}"):
    check_settings(parse_settings(content, "here"), num_tasks=3)


def test_the_defaults_pass_the_checks_and_members_are_counted_from_one():
  check_settings(ExperimentSettings(), num_tasks=3)
  with pytest.raises(ConfigError, match="swarm_sizes: expected at least 1 member each"):
    check_settings(ExperimentSettings(swarm_sizes=(3, 0)), num_tasks=3)


def test_changes_are_told_by_name_but_for_what_changes_no_result():
  before = settings_as_json(ExperimentSettings())
  now = settings_as_json(ExperimentSettings(seed=4, workers=7))
  now["evolution"]["cells"] = 5
  now["output"]["tensorboard"] = False
  changes = changed_settings(parse_settings(before, "before"), parse_settings(now, "now"))
  assert changes == {"seed": (0, 4), "evolution.cells": (15, 5)}
