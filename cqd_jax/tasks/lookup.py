"""Tasks by the names that a configuration gives: those of this package, and anybody's `package.module:function`."""

import importlib
import inspect
from collections.abc import Mapping, Sequence

from cqd_jax.tasks.task import Split, Task

KNOWN = {
  "coding": "cqd_jax.tasks.skills:coding",
  "database": "cqd_jax.tasks.skills:database",
  "os": "cqd_jax.tasks.skills:shell",
}
"""Short names."""


def make_tasks(names: Sequence[str], *, sizes: Mapping[Split, int], seed: int) -> tuple[Task, ...]:
  """The tasks of these names, in their order.

  Args:
    names: of `KNOWN`, or `package.module:function`; the function is called with `sizes` and `seed`, by keyword.
    sizes: number of questions a split.
    seed: of what is drawn.

  Raises:
    ValueError: naming the name that is unknown, cannot be imported, gives no task, or gives one whose name is taken.
  """
  if not names:
    raise ValueError("tasks.names: expected at least one task")
  tasks = tuple(_make(name, sizes, seed) for name in names)
  for index, task in enumerate(tasks):
    if task.name in [other.name for other in tasks[:index]]:
      raise ValueError(f"tasks.names: two tasks are named {task.name!r}")
  return tasks


def _make(name: str, sizes: Mapping[Split, int], seed: int) -> Task:
  where = KNOWN.get(name, name)
  module, _, function = where.partition(":")
  if not module or not function:
    raise ValueError(f"tasks.names: no task {name!r}; there are {', '.join(KNOWN)}, or package.module:function")
  try:
    make = getattr(importlib.import_module(module), function)
  except ImportError as error:
    raise ValueError(f"tasks.names: {name!r} cannot be imported ({error})") from error
  except AttributeError as error:
    raise ValueError(f"tasks.names: {module} has no {function!r}") from error
  try:
    inspect.signature(make).bind(sizes=sizes, seed=seed)
  except TypeError as error:
    raise ValueError(f"tasks.names: {name!r} cannot be called with sizes and seed ({error})") from error
  try:
    task = make(sizes=sizes, seed=seed)
  except Exception as error:  # anybody's code
    raise ValueError(f"tasks.names: {name!r} failed with {type(error).__name__}: {error}") from error
  if not isinstance(task, Task):
    raise ValueError(f"tasks.names: {name!r} gave no task (cqd_jax.tasks.task.Task) but {type(task).__name__}")
  return task
