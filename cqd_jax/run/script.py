"""A script's own models in the durable loop: history, checkpoints, resume, table, picture of the archives, report."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import ConfigError, OutputSettings, check_name
from cqd_jax.genotypes.space import Space, dense_space
from cqd_jax.operators import task_vector
from cqd_jax.run.artifacts import ParamsWriter
from cqd_jax.run.context import Method, RunContext, name_experts
from cqd_jax.run.experiment import show_again
from cqd_jax.run.files import SCRIPT, RunFiles, begin_session, make_run_dir, open_run
from cqd_jax.run.methods import as_methods
from cqd_jax.run.stages import Result, explained, run_stages, show, stage
from cqd_jax.store.history import History
from cqd_jax.store.run_dir import RunDirError, locked
from cqd_jax.store.yaml_text import write_yaml
from cqd_jax.tasks.problem import Problem
from cqd_jax.terminal.interrupt import interruptible
from cqd_jax.trees import fingerprint, leaf_path
from cqd_jax.types import Params

TITLE = "Scores on the test split"


def run(
  *,
  problem: Problem,
  base: Params,
  experts: Sequence[Params],
  methods: Sequence[Any] = ("cycleqd",),
  budget: int = 200,
  run_dir: str | Path,
  seed: int = 0,
  expert_names: Sequence[str] | None = None,
  swarm_sizes: Sequence[int] = (3, 8),
  output: OutputSettings | None = None,
  title: str = TITLE,
  console: Console | None = None,
) -> Result:
  """Evolves merges of your own models, in a run directory that can be resumed: by the same call, as often as need be.

  ```python
  run(
    problem=TracedProblem(score, data, task_names=("low", "high")),
    base=base,
    experts=[low, high],
    methods=["cycleqd", {"use": "cma_es", "genotype": {"use": "coefficients", "granularity": "kernel"}}],
    budget=400,
    run_dir="runs/digits",
    seed=0,
  )
  ```

  Args:
    problem: what is scored; the validation split while searching, the test split for the table.
    base: params of the base model, any pytree of float arrays.
    experts: models tuned from it, each in its structure; they need not be as many as the tasks.
    methods: what to search with: names, or mappings with `use` and settings (see `cqd plugs`), `Method`s or your own
      algorithms. The report shows the archives of the first.
    budget: individuals that each method may score.
    run_dir: where. A run that is there goes on; a finished one is only shown again.
    seed: of everything random here.
    expert_names: E; the tasks' names where there is one expert each, else "1" to "E".
    swarm_sizes: for how many members to report what they solve together.
    output: what the run leaves behind; may be changed when it is resumed.
    title: above the table.
    console: where progress and the table go; None: standard output.

  Raises:
    ValueError: naming the argument that cannot be used, or what was changed since the run began.
    Stopped: after Ctrl-C, when all that was scored is on disk.
  """
  console = console or Console()
  path, output = Path(run_dir), output or OutputSettings()
  chosen = as_methods(methods)
  names = _check_experts(problem, experts, expert_names)
  if budget < 1:
    raise ConfigError(f"budget: expected at least 1, got {budget}")
  if min(swarm_sizes, default=1) < 1:
    raise ConfigError(f"swarm_sizes: expected at least 1 member each, got {tuple(swarm_sizes)}")
  root = _root(base, experts)
  settings = {
    "methods": [_as_json(each, method) for each, method in zip(methods, chosen, strict=True)],
    "budget": budget,
    "seed": seed,
    "experts": list(names),
    "swarm_sizes": list(swarm_sizes),
    "models": _digest(root),
  }
  is_new = not path.exists()
  files = _begin_or_open(path, settings)
  with locked(path), explained(path, "the same call"):
    if files.finished:
      console.print(f"{path}: is finished", highlight=False)
      return show_again(files, title, console)
    if not is_new:
      begin_session(files)
    with _open_context(
      files,
      console,
      problem,
      root=root,
      output=output,
      seed=seed,
      budget=budget,
      swarm_sizes=tuple(swarm_sizes),
      expert_names=names,
    ) as context:
      result = run_stages(context, chosen, _facts(settings))
    show(result, files, console, title)
    return result


@contextlib.contextmanager
def _open_context(files: RunFiles, console: Console, problem: Problem, **settings: Any) -> Iterator[RunContext]:
  """What the stages share; `settings` are further fields of `RunContext`."""
  with interruptible(lambda text: console.print(text, highlight=False)) as interrupt:
    with stage(files, "start"):
      history = History(files.history, problem.task_names)
    with history:
      yield RunContext(
        files=files,
        console=console,
        problem=problem,
        history=history,
        interrupt=interrupt,
        writer=ParamsWriter(),
        parents={},
        unit="score",
        **settings,
      )


def _check_experts(problem: Problem, experts: Sequence[Params], given: Sequence[str] | None) -> tuple[str, ...]:
  """The experts' names."""
  if not experts:
    raise ConfigError("experts: expected at least one model, got none")
  tasks = tuple(problem.task_names)
  if not 2 <= len(tasks) <= 8:
    raise ConfigError(f"problem: expected 2 to 8 tasks, one archive each, got {len(tasks)}")
  usual = name_experts([str(number) for number in range(1, len(experts) + 1)], tasks)
  names = tuple(given) if given is not None else usual
  if len(names) != len(experts) or len(set(names)) != len(names):
    raise ConfigError(f"expert_names: expected {len(experts)} names that differ, got {names}")
  for name in (*tasks, *names):
    check_name(name, "problem" if name in tasks else "expert_names")
  return names


def _root(base: Params, experts: Sequence[Params]) -> Space:
  """Base and experts as the space of their task vectors; raises ValueError naming the expert that does not fit."""
  changes = []
  for index, expert in enumerate(experts):
    try:
      changes.append(task_vector(expert, base))
    except ValueError as error:
      raise ConfigError(f"experts[{index}]: {error}") from error
  return dense_space(jax.tree.map(jnp.asarray, base), jax.tree.map(lambda *leaves: jnp.stack(leaves), *changes))


def _begin_or_open(path: Path, settings: dict[str, Any]) -> RunFiles:
  """The run directory: a new one, or that of the same run.

  Raises:
    RunDirError: naming what was changed since the run began.
  """
  settings = json.loads(json.dumps(settings))
  if not path.exists():
    return make_run_dir(path, SCRIPT, settings, write_yaml(settings))
  files = open_run(path)
  facts = files.read_facts()
  if facts["kind"] != SCRIPT:
    raise RunDirError(f"{path}: is an {facts['kind']}; go on with it by: cqd resume {path}")
  if changed := [name for name, value in settings.items() if facts["settings"].get(name) != value]:
    raise RunDirError(
      f"{path}: began with other {', '.join(changed)}. Change that back to go on with this run, or name another run_dir"
    )
  return files


def _as_json(given: Any, method: Method) -> Any:
  """A method as the run directory remembers it: a plug with its settings, your own object by its name."""
  return {"name": method.name, "plug": Plug.parse(given).dump()} if _is_plug(given) else {"name": method.name}


def _is_plug(given: Any) -> bool:
  return isinstance(given, str | Mapping | Plug)


def _digest(root: Space) -> str:
  """Names base and experts by their bits."""
  digest = hashlib.sha256()
  for tree in (root.base, root.experts):
    for path, leaf in jax.tree.leaves_with_path(tree):
      digest.update(f"{leaf_path(path)} {leaf.shape} {leaf.dtype}".encode())
    digest.update(np.asarray(fingerprint(tree)).tobytes())
  return digest.hexdigest()[:16]


def _facts(settings: dict[str, Any]) -> dict[str, str]:
  first = settings["methods"][0]
  return {
    "seed": str(settings["seed"]),
    "search": f"{first['name']}: {settings['budget']} individuals",
    "experts": ", ".join(settings["experts"]),
  }
