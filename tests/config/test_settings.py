"""Settings: read back as written, overridden by dotted names, and refused by name."""

import contextlib
import io
from pathlib import Path

import pytest
import tyro

from cqd_jax.config.plugs import Plug, resolve, settings_of
from cqd_jax.config.settings import (
  AT_LEAST,
  DEFAULT_METHODS,
  PRESETS,
  RESUME_MAY_CHANGE,
  ConfigError,
  EvolutionSettings,
  ExperimentSettings,
  MeshSettings,
  TrainingSettings,
  changed_settings,
  check_settings,
  dump_settings,
  load_settings,
  parse_settings,
  setting_names,
  settings_as_json,
)

SHIPPED = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))

PLUGS = """\
seed: 3
engine: {use: local, candidates_per_batch: 2}
tasks: {names: [coding, {use: "own.tasks:mine", difficulty: 3}]}
evolution:
  genotype: {use: core, rank: 8}
  cells: cvt
  crossover: {use: linear, std: 0.1}
  mutation: {use: svd, max_scale: 2}
methods:
  - nsga2
  - {use: cma_es, name: mine, genotype: {use: coefficients, starts: [0.3, 0.5]}}
"""


def written(tmp_path, text):
  path = tmp_path / "settings.yaml"
  path.write_text(text)
  return path


def test_settings_survive_the_trip_through_yaml(tmp_path):
  settings = load_settings(written(tmp_path, PLUGS))
  assert settings.seed == 3
  assert settings.engine == Plug("local", {"candidates_per_batch": 2})
  assert settings.tasks.names == (Plug("coding"), Plug("own.tasks:mine", {"difficulty": 3}))
  evolution = settings.evolution
  assert (evolution.genotype, evolution.cells) == (Plug("core", {"rank": 8}), Plug("cvt"))
  assert evolution.crossover == Plug("linear", {"std": 0.1})
  assert evolution.mutation == Plug("svd", {"max_scale": 2})
  assert settings.methods == (
    Plug("nsga2"),
    Plug("cma_es", {"name": "mine", "genotype": {"use": "coefficients", "starts": [0.3, 0.5]}}),
  )
  assert load_settings(written(tmp_path, dump_settings(settings))) == settings


@pytest.mark.parametrize("preset", PRESETS)
def test_the_defaults_of_each_preset_survive_the_trip(tmp_path, preset):
  settings = parse_settings({"preset": preset}, "here")
  assert load_settings(written(tmp_path, dump_settings(settings))) == settings


def test_tasks_may_be_written_as_those_of_a_text_problem(tmp_path):
  text = "problem: {use: text, tasks: [os, {use: coding}], validation: 7}"
  same = "tasks: {names: [os, coding], validation: 7}"
  assert load_settings(written(tmp_path, text)) == load_settings(written(tmp_path, same))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("problem: {use: traced}", "problem: expected {use: text, tasks: "),
    ("problem: text", "problem: expected {use: text, tasks: "),
    ("problem: {use: text, tasks: [os]}\ntasks: {test: 3}", "expected either `problem` or `tasks`, got both"),
    ("problem: {use: text, task: [os]}", "unknown setting 'tasks.task'"),
  ],
)
def test_a_problem_that_is_none_is_refused_by_name(tmp_path, text, message):
  with pytest.raises(ConfigError, match=message):
    load_settings(written(tmp_path, text))


def test_an_empty_file_is_all_defaults(tmp_path):
  assert load_settings(written(tmp_path, "")) == ExperimentSettings()


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_the_shipped_experiments_are_valid_down_to_their_plugs(path):
  settings = load_settings(path)
  check_settings(settings, num_tasks=3)
  resolve("engine", settings.engine, "engine")
  for plug in settings.tasks.names:
    resolve("tasks", plug, "tasks.names")
  for plug in (settings.evolution.as_method(), *settings.methods):
    own = {name: value for name, value in plug.settings.items() if name != "name"}
    resolve("methods", Plug(plug.use, own), plug.use)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("evolution: {childern: 3}", "unknown setting 'evolution.childern'; did you mean 'children'"),
    ("sed: 1", "unknown setting 'sed'; did you mean 'seed'"),
    ("zzzzzz: 1", "unknown setting 'zzzzzz'$"),
    ("seed: one", "seed: .*integer.*got 'one'"),
    ("evolution: {schedule: 3}", r"evolution\.schedule: .*expected a name, or .*got 3"),
    ("evolution: {mutation: {max_scale: 2}}", r"evolution\.mutation: .*expected a name, or .*got .*max_scale"),
    ("tasks: {names: [coding, 3]}", r"tasks\.names\.1: .*expected a name, or .*got 3"),
    ("methods: [{name: mine}]", r"methods\.0: .*expected a name, or .*got .*mine"),
    ("methods: cma_es", "methods: .*tuple, got 'cma_es'"),
    ("evolution: 3", "evolution: "),
    ("preset: maximal", "preset: .*'miniature' or 'llm', got 'maximal'"),
    ("output: {elites: some}", r"output\.elites: .*'all', 'best' or 'none', got 'some'"),
    ("- a list", "expected settings by name, got list"),
    ("a: [1", "not YAML"),
    ("seed: true", "seed: expected a number, got true"),
    ("evolution: {batch_size: false}", r"evolution\.batch_size: expected a number, got false"),
    ("swarm_sizes: [3, true]", "swarm_sizes: expected a number, got true"),
    ("seed: 1:30", "seed: .*integer.*got '1:30'"),
    ("seed: 1\nseed: 2", "'seed' is given twice in line 2"),
    ("seed: " + "9" * 5000, "a number of 5000 digits"),
    ("runs_dir: ~nobody-of-this-name/x", "runs_dir: .*home directory"),
    ('cache_dir: "a\\0b"', "cache_dir: expected text without NUL"),
    ("evolution: {mutation: {" + "x" * 900 + ": 1}}", r"evolution\.mutation: .*characters\)"),
    ("y" * 900 + ": 1", r"unknown setting 'y+\.\.\. \(900 characters\)'"),
  ],
)
def test_a_bad_file_is_refused_by_file_and_field(tmp_path, text, message):
  with pytest.raises(ConfigError, match=message) as caught:
    load_settings(written(tmp_path, text))
  assert "settings.yaml" in str(caught.value)
  assert len(str(caught.value)) < 1000
  assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ConfigError, match=r"none\.yaml: no such"):
    load_settings(tmp_path / "none.yaml")


def test_a_base_makes_other_defaults_which_a_file_can_change(tmp_path):
  llm = load_settings(written(tmp_path, "base: models/base\nexperts: [a, b, c]"))
  assert (llm.preset, llm.max_new_tokens, llm.methods) == ("llm", 512, ())
  assert llm.evolution.genotype == Plug("core", {"rank": 64, "share_base": True})
  assert (llm.output.elites, llm.output.form, llm.output.checkpoint_every) == ("best", "adapters", 10)
  assert llm.engine == Plug("local", {"candidates_per_batch": 4, "prompt_buckets": 16})

  text = "base: models/base\nexperts: [a]\nmax_new_tokens: 9\nevolution: {genotype: {use: core, rank: 8}}\n"
  own = load_settings(written(tmp_path, text + "output: {elites: none}\nmethods: [cma_es]\nengine: local"))
  assert (own.max_new_tokens, own.methods) == (9, (Plug("cma_es"),))
  assert own.evolution.genotype == Plug("core", {"rank": 8})  # a plug is one setting: nothing of the preset's is left
  assert own.engine == Plug("local")
  assert (own.output.elites, own.output.form, own.output.checkpoint_every) == ("none", "adapters", 10)  # a group is not

  miniature = load_settings(written(tmp_path, "base: models/base\nexperts: [a]\npreset: miniature"))
  assert (miniature.preset, miniature.max_new_tokens, miniature.methods) == ("miniature", 30, DEFAULT_METHODS)
  assert load_settings(written(tmp_path, "preset: llm")).max_new_tokens == 512
  given = load_settings(written(tmp_path, "seed: 1"), {"base": "models/base"})
  assert (given.preset, given.base, given.seed, given.max_new_tokens) == ("llm", Path("models/base"), 1, 512)


def test_dotted_options_override_the_file(tmp_path):
  default = load_settings(written(tmp_path, "seed: 3\nevolution: {children: 10}\n"))
  settings = tyro.cli(ExperimentSettings, default=default, args=["--evolution.children", "7", "--unsafe"])
  assert (settings.seed, settings.evolution.children, settings.unsafe) == (3, 7, True)


@pytest.mark.parametrize(
  ("arguments", "path", "expected"),
  [
    (["--evolution.mutation", "svd"], "evolution.mutation", Plug("svd")),
    (["--evolution.mutation", "{use: svd, max_scale: 2}"], "evolution.mutation", Plug("svd", {"max_scale": 2})),
    (["--evolution.mutation", "None"], "evolution.mutation", None),
    (["--evolution.crossover", "my.module:mine"], "evolution.crossover", Plug("my.module:mine")),
    (["--engine", "{use: local, prompt_buckets: 3}"], "engine", Plug("local", {"prompt_buckets": 3})),
    (["--methods", "cma_es", "{use: nsga2, low: 0.1}"], "methods", (Plug("cma_es"), Plug("nsga2", {"low": 0.1}))),
    (["--methods"], "methods", ()),
    (["--tasks.names", "os", "my.module:mine"], "tasks.names", (Plug("os"), Plug("my.module:mine"))),
  ],
)
def test_plugs_are_options(arguments, path, expected):
  found = tyro.cli(ExperimentSettings, default=ExperimentSettings(), args=arguments)
  for name in path.split("."):
    found = getattr(found, name)
  assert found == expected


@pytest.mark.parametrize("name", ["evolution.mutation", "evolution.genotype"])
@pytest.mark.parametrize("text", ["3", "[3", "{max_scale: 2}"])
def test_an_option_that_is_no_plug_is_refused_without_our_innards(name, text):
  box = io.StringIO()
  with pytest.raises(SystemExit), contextlib.redirect_stderr(box):
    tyro.cli(ExperimentSettings, default=ExperimentSettings(), args=[f"--{name}", text], console_outputs=True)
  said = " ".join(line.strip("│| ") for line in box.getvalue().splitlines())
  assert "expected a name, or {use: NAME, ...}" in said
  assert "lambda" not in said


def test_help_says_what_each_setting_is():
  box = io.StringIO()
  with pytest.raises(SystemExit), contextlib.redirect_stdout(box):
    tyro.cli(ExperimentSettings, default=ExperimentSettings(), args=["--help"])
  text = box.getvalue()
  for name in setting_names():
    assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize("name", AT_LEAST)
def test_what_is_too_small_is_refused_before_anything_is_begun(name):
  content = settings_as_json(ExperimentSettings())
  *groups, last = name.split(".")
  group = content[groups[0]] if groups else content
  group[last] = AT_LEAST[name] - 1
  with pytest.raises(ConfigError, match=f"^{name}: expected at least {AT_LEAST[name]}, got {AT_LEAST[name] - 1}"):
    check_settings(parse_settings(content, "here"), num_tasks=3)


def test_every_number_that_counts_something_has_a_least():
  """All settings that are whole numbers, but for the seed, which may be any."""
  content = settings_as_json(ExperimentSettings())
  counts = {name for name in setting_names() if type(_at(content, name)) is int}
  assert counts - {"seed"} == set(AT_LEAST)


def _at(content, name):
  for part in name.split("."):
    content = content[part]
  return content


def test_the_defaults_pass_the_checks_and_members_are_counted_from_one():
  check_settings(ExperimentSettings(), num_tasks=3)
  with pytest.raises(ConfigError, match="swarm_sizes: expected at least 1 member each"):
    check_settings(ExperimentSettings(swarm_sizes=(3, 0)), num_tasks=3)
  check_settings(ExperimentSettings(swarm_sizes=()), num_tasks=3)


@pytest.mark.parametrize(
  ("settings", "num_tasks", "message"),
  [
    ({"evolution": EvolutionSettings(children=7, batch_size=3)}, 3, r"^evolution\.children: .*multiple of .*=3, got 7"),
    ({"mesh": MeshSettings(model=2)}, 3, r"^mesh\.model: expected 1, got 2: .*share_base"),
    ({}, 1, r"^tasks\.names: expected 2 to 8 tasks, one archive each, got 1"),
    ({}, 9, r"^tasks\.names: expected 2 to 8 tasks, one archive each, got 9"),
    ({"experts": (Path("a"),)}, 3, r"^base: expected the folder of the experts' base model, got none"),
    ({"base": Path("a")}, 3, r"^experts: expected at least one folder, got none"),
    ({}, 4, r"^training\.expert_learning_rates: expected 4, one per task, got \(0\.0005"),
    (
      {"training": TrainingSettings(base_stop_at=float("nan"))},
      3,
      r"^training\.base_stop_at: expected finite numbers, got nan",
    ),
    (
      {"training": TrainingSettings(expert_learning_rates=(0.1, float("inf"), 0.1))},
      3,
      r"^training\.expert_learning_rates: expected finite numbers, got \[0\.1, inf",
    ),
  ],
)  # fmt: skip
def test_what_a_type_cannot_say_is_refused_by_name(settings, num_tasks, message):
  with pytest.raises(ConfigError, match=message):
    check_settings(ExperimentSettings(**settings), num_tasks=num_tasks)


def test_weights_are_divided_where_the_base_is_shared():
  evolution = EvolutionSettings(genotype=Plug("core", {"share_base": True}))
  check_settings(ExperimentSettings(mesh=MeshSettings(model=2), evolution=evolution), num_tasks=3)


def test_changes_are_told_by_name_but_for_what_changes_no_result():
  before = settings_as_json(ExperimentSettings())
  now = settings_as_json(ExperimentSettings(seed=4, workers=7, mesh=MeshSettings(population=2)))
  now["evolution"]["cells"] = {"use": "from_experts", "shape": 5}
  now["methods"] = now["methods"][1:]
  now["output"]["tensorboard"] = False
  changes = changed_settings(parse_settings(before, "before"), parse_settings(now, "now"))
  assert changes == {
    "seed": (0, 4),
    "evolution.cells": ("from_experts", {"use": "from_experts", "shape": 5}),
    "methods": (before["methods"], now["methods"]),
  }


@pytest.mark.parametrize("name", RESUME_MAY_CHANGE)
def test_what_may_change_is_a_setting(name):
  assert any(setting.split(".")[0] == name for setting in setting_names())


def test_evolution_is_a_method_with_what_is_given():
  plug = EvolutionSettings(children=8, batch_size=2, mutation=Plug("svd", {"max_scale": 2})).as_method()
  assert plug.use == "cycleqd"
  assert set(plug.settings) == {
    "batch_size", "schedule", "flip_interval", "genotype", "cells", "selection", "mutation",
  }  # fmt: skip
  assert plug.settings["mutation"] == Plug("svd", {"max_scale": 2})
  function = resolve("methods", plug, "evolution").func
  known = settings_of("methods", function)
  assert set(plug.settings) | {"crossover"} == set(known)  # nothing of the method is out of a configuration's reach


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seed": -1}, r"seed: expected 0 to 2\*\*32 - 1, got -1"),
    ({"seed": 2**32}, r"seed: expected 0 to 2\*\*32 - 1, got 4294967296"),
    ({"workers": 10**6}, "workers: expected at most 1024, got 1000000"),
    ({"swarm_sizes": (3, 10**9)}, "swarm_sizes: expected at most 10000000 members each"),
    ({"tasks": {"validation": 10**9}}, r"tasks\.validation: expected at most 1000000, got 1000000000"),
    ({"evolution": {"children": 4 * 10**9}}, r"evolution\.children: expected at most 10000000"),
    ({"name": "../../x"}, r"name: expected a name, which cannot lead to another folder, got '\.\./\.\./x'"),
    ({"name": "/tmp/x"}, "name: expected a name, which cannot"),
    ({"name": "a\\b"}, "name: expected a name, which cannot"),
    ({"name": ".."}, "name: expected a name, which cannot"),
    ({"name": "a\nb"}, "name: expected a name, which cannot"),
    ({"name": " "}, "name: expected a name of 1 to 100 bytes"),
    ({"name": "x" * 101}, "name: expected a name of 1 to 100 bytes"),
  ],
)
def test_numbers_and_names_have_bounds(changes, message):
  with pytest.raises(ConfigError, match=message):
    check_settings(parse_settings(changes, "here"), num_tasks=3)


def test_a_text_stays_the_text_that_it_is(tmp_path):
  assert load_settings(written(tmp_path, "name: yes")).name == "yes"
  assert load_settings(written(tmp_path, "name: 1:30")).name == "1:30"
  for name in ("1e5", "0o7", "yes", "010", "null", "2001-01-01"):
    settings = ExperimentSettings(name=name)
    assert load_settings(written(tmp_path, dump_settings(settings))) == settings


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  settings = load_settings(written(tmp_path, "runs_dir: ~/runs\ncache_dir: ~/cache\nbase: ~/base\nexperts: [~/a]\n"))
  assert (settings.runs_dir, settings.cache_dir) == (tmp_path / "runs", tmp_path / "cache")
  assert (settings.base, settings.experts) == (tmp_path / "base", (tmp_path / "a",))
