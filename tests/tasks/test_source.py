"""Digests of code: what a score depends on changes them, and nothing else does."""

import functools
import importlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.tasks.source import source_digest

GRADER = '''
"""Grades."""
import functools
import math

LIMIT = 0.5

class Grader:
  """One that grades."""

  def __init__(self, tolerance=0.1, weights=()):
    self.tolerance = tolerance
    self.weights = weights
    self._calls = 0

  def passed(self, value):
    self._calls += 1
    return abs(value) < self.tolerance * LIMIT

def score(value):
  return value > LIMIT

def scaled(factor):
  def inner(value):
    return factor * value
  return inner

def outer(value, power=2):
  return math.pow(helped(value), power)

from own_helpers import helped
'''
HELPERS = """
def helped(value):
  return value + 1

def other(value):
  return value
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
  """Imports modules from sources, as a later session would."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, "dont_write_bytecode", True)

  def make(grader=GRADER, helpers=HELPERS):
    for name, source in (("own_helpers", helpers), ("own_grader", grader)):
      (tmp_path / f"{name}.py").write_text(source)
      sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return importlib.import_module("own_grader")

  yield make
  for name in ("own_helpers", "own_grader"):
    sys.modules.pop(name, None)


THINGS = {
  "function": lambda module: module.score,
  "class": lambda module: module.Grader,
  "object": lambda module: module.Grader(),
  "method": lambda module: module.Grader().passed,
  "partial": lambda module: functools.partial(module.outer, power=3),
  "in a list": lambda module: types.SimpleNamespace(graders=[{"a": module.score}]),
  "compiled": lambda module: jax.jit(module.score),
}


@pytest.mark.parametrize("name", THINGS)
def test_a_digest_is_that_of_the_modules_code(load, name):
  before = source_digest(THINGS[name](load()))
  assert source_digest(THINGS[name](load())) == before
  commented = GRADER.replace("LIMIT = 0.5", "# a comment\nLIMIT  =  0.5  # another\n\n").replace(
    "return abs", "return  abs"
  )
  assert source_digest(THINGS[name](load(commented))) == before
  documented = GRADER.replace('"""Grades."""', '"""Grades well."""').replace("One that grades.", "A grader.")
  assert source_digest(THINGS[name](load(documented))) == before
  assert source_digest(THINGS[name](load(GRADER.replace("LIMIT = 0.5", "LIMIT = 0.25")))) != before


def test_a_module_that_is_loaded_again_is_read_again(load):
  before = source_digest(load().score)
  assert source_digest(load(GRADER.replace("value > LIMIT", "value >= LIMIT")).score) != before
  assert source_digest(load().score) == before


def test_the_users_other_modules_count_where_they_are_used(load):
  before = source_digest(load().outer)
  assert source_digest(load(helpers=HELPERS.replace("value + 1", "value + 2")).outer) != before
  used_as_module = GRADER.replace("from own_helpers import helped", "import own_helpers").replace(
    "helped(value)", "own_helpers.helped(value)"
  )
  before = source_digest(load(used_as_module).outer)
  assert source_digest(load(used_as_module, HELPERS.replace("value + 1", "value + 2")).outer) != before
  before = source_digest(load(used_as_module).score)
  assert source_digest(load(used_as_module, HELPERS.replace("value + 1", "value + 2")).score) == before


def test_what_is_bound_counts(load):
  module = load()
  digests = [
    source_digest(thing)
    for thing in (
      module.outer,
      functools.partial(module.outer, power=2),
      functools.partial(module.outer, power=3),
      functools.partial(module.outer, 2),
      functools.partial(functools.partial(module.outer, 2), power=3),
      functools.partial(module.outer, (0.1, 0.2)),
      functools.partial(module.outer, (0.2, 0.1)),
      functools.partial(module.outer, np.array([0.1, 0.2])),
      functools.partial(module.outer, np.array([0.2, 0.1])),
      functools.partial(module.outer, np.array([[0.2, 0.1]])),
      functools.partial(module.outer, jnp.array([0.2, 0.1])),
      functools.partial(module.outer, jax.random.key(0)),
      functools.partial(module.outer, jax.random.key(1)),
      module.scaled(1.0),
      module.scaled(2.0),
    )
  ]
  assert len(set(digests)) == len(digests)
  assert source_digest(functools.partial(module.outer, power=3)) == digests[2]
  assert source_digest(module.scaled(2.0)) == digests[-1]
  assert source_digest(functools.partial(module.outer, jnp.array([0.2, 0.1]))) == digests[10]


def test_public_attributes_count_and_state_does_not(load):
  module = load()
  before = source_digest(module.Grader())
  digests = {before, *(source_digest(grader) for grader in (module.Grader(0.2), module.Grader(weights=(1, 2))))}
  assert len(digests) == 3
  assert source_digest(module.Grader(weights=(2, 1))) not in digests
  used = module.Grader()
  used.passed(0)
  assert source_digest(used) == before
  assert source_digest(module.Grader().passed) != source_digest(module.Grader(0.2).passed)


def test_what_is_installed_does_not_count():
  """Nothing of NumPy or JAX is read: their functions have equal digests."""
  assert source_digest(np.linalg.norm) == source_digest(np.linalg.svd)


def test_a_default_and_an_empty_closure_do_no_harm(load):
  def early():
    return later

  before = source_digest(early)  # `later` is a cell that is not filled yet
  later = 3
  assert source_digest(early) != before


def test_an_object_that_holds_itself_comes_to_an_end(load):
  grader = load().Grader()
  grader.own = grader
  grader.graders = [grader] * 1000
  assert len(source_digest(grader)) == 16


SCRIPT = """
import functools
import sys
from cqd_jax.tasks.source import source_digest

LIMIT = 0.5
NAMES = "not used"

class Model:
  width = 3
  def apply(self, value):
    return helped(value) * self.width

model = Model()

def helped(value):
  return value + 1

def unused(value):
  return value

def score(value):
  def inner():
    return LIMIT
  return model.apply(value) > inner()

print(source_digest(score), source_digest(Model), source_digest(lambda value: score(value)))
"""


RUN_EACH = """
import runpy
import sys
for path in sys.argv[1:]:
  runpy.run_path(path, run_name="__main__")
"""


def digests_of_scripts(tmp_path, sources):
  paths = []
  for source in sources:
    paths.append(tmp_path / f"script_{len(paths)}.py")
    paths[-1].write_text(source)
  done = subprocess.run([sys.executable, "-c", RUN_EACH, *paths], capture_output=True, text=True, check=True)
  return [line.split() for line in done.stdout.splitlines()]


def test_of_a_script_what_is_used_counts_and_the_rest_may_change(tmp_path):
  changes = [
    ("not used", "still not used", (False, False, False)),
    ("return value\n\ndef score", "return value + 3\n\ndef score", (False, False, False)),
    ("import sys\n", "import sys\n\n# a comment\n", (False, False, False)),
    ("\nprint(", "\nbudget = 100\nprint(", (False, False, False)),
    ("LIMIT = 0.5", "LIMIT = 0.25", (True, False, True)),
    ("value + 1", "value + 2", (True, True, True)),
    ("width = 3", "width = 4", (True, True, True)),
    ("model.apply(value) >", "model.apply(value) >=", (True, False, True)),
    ("return LIMIT", "return -LIMIT", (True, False, True)),
  ]
  assert all(SCRIPT.count(old) == 1 for old, _, _ in changes)
  before, *digests = digests_of_scripts(tmp_path, [SCRIPT, *(SCRIPT.replace(old, new) for old, new, _ in changes)])
  assert len(set(before)) == 3
  for now, (_, new, changed) in zip(digests, changes, strict=True):
    assert tuple(one != other for one, other in zip(before, now, strict=True)) == changed, new


NOTEBOOK = """
from cqd_jax.tasks.source import source_digest
import math
cell = '''
LIMIT = 0.5
def helped(value):
  return math.sin(value)
def score(value):
  return [helped(value) > LIMIT for _ in range(3)]
'''
def digest(cell):
  exec(cell, globals())
  return source_digest(score)
print(
  digest(cell),
  digest(cell),
  digest(cell.replace("sin", "cos")),
  digest(cell.replace("0.5", "0.25")),
  digest(cell.replace("range(3)", "range(4)")),
  digest(cell.replace("value) >", "-value) >")),
)
"""


def test_functions_that_no_file_holds_are_told_apart_as_they_are_compiled():
  done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=True)
  first, again, *others = done.stdout.split()
  assert again == first
  assert len({first, *others}) == 5
