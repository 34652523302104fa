"""Tasks by name: those of the package, anybody's functions, and names that are none."""

import sys
import types

import pytest

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import ConfigError, ExperimentSettings, TaskSettings
from cqd_jax.run.text_run import check_questions, tasks_of
from cqd_jax.tasks import Example, Harness, Message


class Dialogue:
  """An episode, which is as good as a task."""

  name = "dialogue"
  harness = Harness("dialogue", "run = eval")
  max_turns = 2

  def __init__(self, sizes, length):
    self.sizes = sizes
    self.length = length

  def examples(self, split):
    return [Example("again?", "no")] * self.sizes[split]

  def opening(self, example):
    return (Message("user", example.prompt),)

  def job(self, example, answers):
    return None

  def reply(self, example, answers, outcome):
    return float(answers[-1] == example.answer)


@pytest.fixture(autouse=True)
def module(monkeypatch):
  """A module of functions that make tasks, or do not."""

  def broken(sizes, seed):
    raise KeyError("data")

  def another(*, sizes, seed):
    from cqd_jax.tasks.skills import shell

    return shell(sizes=sizes, seed=seed)

  def dialogue(*, sizes, seed, length: int = 3):
    return Dialogue(sizes, length)

  own = types.ModuleType("own_tasks")
  own.another, own.broken, own.dialogue = another, broken, dialogue
  own.leaves = lambda *, sizes, seed: sys.exit(3)

  class Elsewhere(Dialogue):
    name = "../../elsewhere"

  own.elsewhere = lambda *, sizes, seed: Elsewhere(sizes, 3)
  own.nothing, own.other_arguments = lambda sizes, seed: 3, lambda path: None
  monkeypatch.setitem(sys.modules, "own_tasks", own)


def make(*names, seed=0, validation=2, test=2):
  tasks = TaskSettings(names=tuple(map(Plug.parse, names)), train=1, validation=validation, test=test)
  return tasks_of(ExperimentSettings(seed=seed, tasks=tasks))


def test_names_of_the_package_and_own_functions():
  tasks = make("coding", "own_tasks:another", seed=1)
  assert [task.name for task in tasks] == ["coding", "os"]
  assert [len(task.examples("validation")) for task in tasks] == [2, 2]
  again, other = make("coding", seed=1)[0], make("coding", seed=2)[0]
  assert again.examples("test") == tasks[0].examples("test")
  assert other.examples("test") != tasks[0].examples("test")


def test_an_episode_with_settings_of_its_own():
  _, task = make("coding", {"use": "own_tasks:dialogue", "length": 5})
  assert (task.name, task.length, task.sizes) == ("dialogue", 5, {"train": 1, "validation": 2, "test": 2})


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("bash", "no tasks 'bash'; there are coding, database, os, .*or package.module:function"),
    ("codng", "no tasks 'codng'; .*did you mean 'coding'"),
    (":x", "no tasks ':x'"),
    ("x:", "no tasks 'x:'"),
    ("no_such_module:f", "'no_such_module:f' cannot be imported"),
    ("own_tasks:f", "own_tasks has no 'f'"),
    ("own_tasks:broken", "'own_tasks:broken' failed with KeyError: 'data'"),
    ("own_tasks:leaves", "'own_tasks:leaves' failed with SystemExit: 3"),
    ("leaves_when_imported:f", r"'leaves_when_imported:f' cannot be imported \(SystemExit: 4\)"),
    ("a/b:c", "no tasks 'a/b:c'"),
    ("own_tasks:elsewhere", "the name of 'own_tasks:elsewhere': expected a name, which cannot lead to another folder"),
    ("own_tasks:nothing", "'own_tasks:nothing' gave no task .* but int"),
    ("own_tasks:other_arguments", "'own_tasks:other_arguments' cannot be called with sizes and seed"),
    ({"use": "own_tasks:dialogue", "lenth": 5}, "own_tasks:dialogue has no setting 'lenth'; did you mean 'length'"),
    ({"use": "own_tasks:dialogue", "sizes": 5}, "own_tasks:dialogue has no setting 'sizes'"),
  ],
)
def test_what_is_no_task_is_named(name, message, tmp_path, monkeypatch):
  (tmp_path / "leaves_when_imported.py").write_text("raise SystemExit(4)")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match=rf"^tasks\.names: {message}"):
    make("coding", name)


def test_a_setting_of_the_wrong_type_is_named():
  with pytest.raises(ValueError, match=r"^tasks\.names\.length: .*integer, got 'long'"):
    make("coding", {"use": "own_tasks:dialogue", "length": "long"})


def test_names_must_differ():
  with pytest.raises(ValueError, match=r"^tasks\.names: two tasks are named 'os'"):
    make("os", "own_tasks:another")
  with pytest.raises(ValueError, match=r"^tasks\.names: expected at least one task"):
    make()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_task_without_questions_is_named(split):
  tasks = make("own_tasks:dialogue", "coding", **{split: 0})
  with pytest.raises(ConfigError, match=f"tasks: expected some questions in {split}, got none of dialogue"):
    check_questions(tasks)
  check_questions(make("own_tasks:dialogue", "coding"))
