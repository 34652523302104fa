"""The README's Python example runs as it stands, and what it names is there."""

import re

import numpy as np
import pytest


@pytest.mark.usefixtures("qdax_ranks")
def test_the_example_runs(pytestconfig, capsys):
  text = (pytestconfig.rootpath / "README.md").read_text(encoding="utf-8")
  (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names = {}
  exec(compile(example, "README.md", "exec"), names)
  assert (np.asarray(names["metrics"]["coverage"])[-1] > 3 / 225).all()  # more than the experts it began with
  assert "[" in capsys.readouterr().out
  assert len(example.strip().splitlines()) <= 30


def test_pictures_and_files_that_it_names_exist(pytestconfig):
  text = (pytestconfig.rootpath / "README.md").read_text(encoding="utf-8")
  named = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"(experiments/\w+\.(?:py|yaml))", text)
  assert named
  for name in named:
    assert (pytestconfig.rootpath / name).is_file(), name
