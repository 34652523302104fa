"""Options that change one setting of a plug, and the list of what can be named."""

import pytest
from rich.console import Console

from cqd_jax.cli.main import main
from cqd_jax.cli.plug_options import split_plug_options, with_plug_options
from cqd_jax.cli.plugs_table import show_plugs
from cqd_jax.config.plugs import KINDS, Plug, PlugError
from cqd_jax.config.settings import ConfigError, ExperimentSettings


def test_settings_of_plugs_are_taken_from_among_the_options():
  options = ["--seed", "1", "--evolution.mutation.max-scale", "2", "--evolution.mutation", "svd", "--unsafe"]
  rest, own = split_plug_options([*options, "--engine.prompt-buckets=3"])
  assert rest == ["--seed", "1", "--evolution.mutation", "svd", "--unsafe"]
  assert own == {"evolution.mutation.max_scale": 2, "engine.prompt_buckets": 3}


def test_they_change_the_plug_that_is_there_or_the_usual_one():
  settings = with_plug_options(
    ExperimentSettings(),
    {"evolution.crossover.std": 0.1, "evolution.genotype.rank": 4, "engine.candidates_per_batch": 2},
  )
  assert settings.evolution.crossover == Plug("linear", {"std": 0.1})
  assert settings.evolution.genotype == Plug("dense", {"rank": 4})  # refused by name when it is resolved
  assert settings.engine == Plug("local", {"candidates_per_batch": 2})


def test_an_option_without_a_value_is_named():
  with pytest.raises(ConfigError, match=r"--evolution\.mutation\.rate: expected a value"):
    split_plug_options(["--evolution.mutation.rate"])


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_plugs_are_listed_with_settings_and_defaults(kind, tmp_path):
  with (tmp_path / "log").open("w") as log:
    show_plugs(kind, Console(file=log, width=200))
  text = (tmp_path / "log").read_text()
  for name in KINDS if kind is None else [kind]:
    for use in KINDS[name].table:
      assert use in text
  if kind in (None, "genotype"):
    assert "[E, G]" in text  # no markup


def test_another_kind_is_refused_by_name(capsys):
  with pytest.raises(PlugError, match=r"no kind 'crossovr'; there are .*; did you mean 'crossover'"):
    show_plugs("crossovr", Console())
  assert main(["plugs", "zzz"]) == 2
  assert "plugs: no kind 'zzz'" in capsys.readouterr().err
