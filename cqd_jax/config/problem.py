"""`problem: {use: text, tasks: [...]}`: another way to write the tasks of an experiment, problem and tasks as plugs."""

from collections.abc import Mapping
from typing import Any

from cqd_jax.store.yaml_text import shortened


def with_tasks(content: Mapping[str, Any]) -> dict[str, Any]:
  """Settings as a file gives them, with `tasks` in the place of `problem`.

  What a problem has beside its tasks (train, validation, test, labels) is what `tasks` has beside `names`.

  Raises:
    ValueError: naming what it cannot be.
  """
  if "problem" not in content:
    return dict(content)
  problem = content["problem"]
  if not isinstance(problem, Mapping) or problem.get("use") != "text":
    raise ValueError(
      f"problem: expected {{use: text, tasks: [...]}}, got {shortened(repr(problem))}; other problems are run from a "
      "script (docs/script.md)"
    )
  if "tasks" in content:
    raise ValueError("problem: expected either `problem` or `tasks`, got both")
  tasks = {"names" if name == "tasks" else name: value for name, value in problem.items() if name != "use"}
  return {name: value for name, value in content.items() if name != "problem"} | {"tasks": tasks}
