"""The README's Python examples run as they stand, and what it names is there."""

import re

import jax
import numpy as np
import pytest
import yaml

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import check_settings, parse_settings
from cqd_jax.operators import linear_merge


@pytest.fixture
def run(pytestconfig):
  """Runs the example of that number; gives its names."""

  def execute(number):
    text = (pytestconfig.rootpath / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]
    assert len(example.strip().splitlines()) <= 30
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    return names

  return execute


@pytest.mark.usefixtures("qdax_ranks")
def test_the_loop_with_qdax(run, capsys):
  names = run(0)
  assert (np.asarray(names["metrics"]["coverage"])[-1] > 3 / 225).all()  # more than the experts it began with
  assert "[" in capsys.readouterr().out


def test_core_space(run, capsys):
  names = run(1)
  assert capsys.readouterr().out.startswith("Fit(path='embed/embedding', expert=0, rank=16, energy=0.")
  assert names["tokens"].shape == (3, 2, 8)
  merged = linear_merge(
    jax.random.key(0), *(names["basis"].task_vector(names[each]) for each in ("first", "second")), std=0.1
  )
  expected = jax.tree.map(lambda one, other: one + other, names["base"], merged)
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), names["params"], expected)


def test_hugging_face_folders(run):
  names = run(2)
  assert names["logits"].shape == (1, 3, 128)
  assert names["model"].params["head"]["kernel"].dtype == "bfloat16"
  assert names["model"].config == names["config"]


def test_the_experiment_that_it_shows_is_one(pytestconfig):
  text = (pytestconfig.rootpath / "README.md").read_text(encoding="utf-8")
  (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
  settings = parse_settings(yaml.safe_load(shown), "README.md")
  check_settings(settings, 3)
  assert settings.evolution.genotype == Plug("core", {"rank": 64, "share_base": True})
  assert settings.max_new_tokens == 512  # the preset of real models


def test_pictures_and_files_that_it_names_exist(pytestconfig):
  text = (pytestconfig.rootpath / "README.md").read_text(encoding="utf-8")
  named = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"(experiments/\w+\.(?:py|yaml))", text)
  assert named
  for name in named:
    assert (pytestconfig.rootpath / name).is_file(), name
