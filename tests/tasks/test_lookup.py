"""Tasks by name: those of the package, anybody's functions, and names that are none."""

import sys
import types

import pytest

from cqd_jax.tasks.lookup import make_tasks

SIZES = {"train": 1, "validation": 2, "test": 2}


@pytest.fixture
def module(monkeypatch):
  """A module of functions that make tasks, or do not."""

  def broken(sizes, seed):
    raise KeyError("data")

  def another(*, sizes, seed):
    from cqd_jax.tasks.skills import shell

    return shell(sizes=sizes, seed=seed)

  own = types.ModuleType("own_tasks")
  own.another, own.broken = another, broken
  own.nothing, own.other_arguments = lambda sizes, seed: 3, lambda path: None
  monkeypatch.setitem(sys.modules, "own_tasks", own)


def test_names_of_the_package_and_own_functions(module):
  tasks = make_tasks(["coding", "own_tasks:another"], sizes=SIZES, seed=1)
  assert [task.name for task in tasks] == ["coding", "os"]
  assert [len(task.examples("validation")) for task in tasks] == [2, 2]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("bash", "no task 'bash'; there are coding, database, os, or package.module:function"),
    (":x", "no task ':x'"),
    ("x:", "no task 'x:'"),
    ("no_such_module:f", "'no_such_module:f' cannot be imported"),
    ("own_tasks:f", "own_tasks has no 'f'"),
    ("own_tasks:broken", "'own_tasks:broken' failed with KeyError: 'data'"),
    ("own_tasks:nothing", "gave no task .* but int"),
    ("own_tasks:other_arguments", "cannot be called with sizes and seed"),
  ],
)
def test_what_is_no_task_is_named(module, name, message):
  with pytest.raises(ValueError, match=rf"tasks\.names: .*{message}|{message}"):
    make_tasks(["coding", name], sizes=SIZES, seed=0)


def test_names_must_differ(module):
  with pytest.raises(ValueError, match="two tasks are named 'os'"):
    make_tasks(["os", "own_tasks:another"], sizes=SIZES, seed=0)
  with pytest.raises(ValueError, match="expected at least one task"):
    make_tasks([], sizes=SIZES, seed=0)
