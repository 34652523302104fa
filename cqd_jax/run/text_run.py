"""Runs of language models: tasks by name, the miniature experts or Hugging Face folders, answers really executed."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from cqd_jax.config.plugs import Plug, PlugError, resolve
from cqd_jax.config.settings import ConfigError, ExperimentSettings, MeshSettings, check_name, check_settings
from cqd_jax.engines.text_interface import TextInterface, interface_of, miniature_interface
from cqd_jax.genotypes.placement import make_mesh, place_basis, place_replicated
from cqd_jax.genotypes.space import Space, core_space, dense, dense_space
from cqd_jax.hub.load import load_pretrained, open_pretrained
from cqd_jax.hub.model_card import Parent, parent_of
from cqd_jax.run.artifacts import HubWriter
from cqd_jax.run.context import BASIS, RunContext, keep_basis, name_experts
from cqd_jax.run.files import RunFiles
from cqd_jax.run.folders import Folders, core_experts, dense_experts, load_base, open_folders
from cqd_jax.run.miniature import load_or_train, stack_task_vectors
from cqd_jax.sandbox.on_demand import SandboxOnDemand
from cqd_jax.search.variation import unbound
from cqd_jax.store.checksums import verify
from cqd_jax.store.history import History
from cqd_jax.tasks.episode import Episode
from cqd_jax.tasks.execution import Harness
from cqd_jax.tasks.task import Split, Task
from cqd_jax.tasks.text import TextProblem, harnesses_of
from cqd_jax.terminal.interrupt import Interrupt


@contextlib.contextmanager
def open_problem(settings: ExperimentSettings) -> Iterator[tuple[TextProblem, TextInterface]]:
  """The problem that the settings describe, and how its models are spoken to.

  The sandbox starts when the first answer is executed, and ends with the block.

  Raises:
    ValueError: naming the setting or the folder that cannot be used.
  """
  tasks = tasks_of(settings)
  check_settings(settings, len(tasks))
  check_questions(tasks)
  interface = miniature_interface() if settings.base is None else interface_of(open_pretrained(settings.base))
  engine = make_engine(settings, interface)
  harnesses = harnesses_of(tasks)
  with SandboxOnDemand(harnesses, workers=settings.workers or None, unsafe=settings.unsafe) as execute:
    problem = TextProblem(
      tasks,
      engine,
      execute,
      max_new_tokens=settings.max_new_tokens,
      num_labels=settings.tasks.labels,
      transcripts={"validation": settings.output.transcripts, "test": settings.output.samples},
    )
    yield problem, interface


def make_engine(settings: ExperimentSettings, interface: TextInterface) -> Any:
  """The engine that the settings name; raises ValueError naming the setting that cannot be used."""
  make = resolve("engine", settings.engine, "engine")
  given = {"mesh": mesh_of(settings.mesh)} if "mesh" in inspect.signature(make).parameters else {}
  try:
    return make(interface, **given)
  except ValueError as error:
    raise ConfigError(f"engine: {error}") from error


def tasks_of(settings: ExperimentSettings) -> tuple[Task | Episode, ...]:
  """The tasks that the settings name.

  Raises:
    ValueError: naming the one that cannot be made.
  """
  own = settings.tasks
  sizes: dict[Split, int] = {"train": own.train, "validation": own.validation, "test": own.test}
  if not own.names:
    raise PlugError("tasks.names: expected at least one task")
  tasks = tuple(_make_task(plug, sizes, settings.seed) for plug in own.names)
  for index, task in enumerate(tasks):
    check_name(task.name, f"tasks.names: the name of {own.names[index].use!r}")
    if task.name in [other.name for other in tasks[:index]]:
      raise PlugError(f"tasks.names: two tasks are named {task.name!r}")
  return tasks


def _make_task(plug: Plug, sizes: Mapping[Split, int], seed: int) -> Task | Episode:
  make = resolve("tasks", plug, "tasks.names")
  try:
    inspect.signature(make).bind(sizes=sizes, seed=seed)
  except TypeError as error:
    raise PlugError(f"tasks.names: {plug.use!r} cannot be called with sizes and seed ({error})") from error
  try:
    task = make(sizes=sizes, seed=seed)
  except (Exception, SystemExit) as error:  # anybody's code
    raise PlugError(f"tasks.names: {plug.use!r} failed with {type(error).__name__}: {error}") from error
  if not isinstance(task, Task | Episode):
    raise PlugError(f"tasks.names: {plug.use!r} gave no task (cqd_jax.tasks.task.Task) but {type(task).__name__}")
  return task


def check_questions(tasks: tuple[Task | Episode, ...]) -> None:
  """Raises unless each task has questions in the splits that are asked."""
  splits: tuple[Split, ...] = ("validation", "test")
  for split in splits:
    for task in tasks:
      if not len(task.examples(split)):
        raise ConfigError(f"tasks: expected some questions in {split}, got none of {task.name}")


def mesh_of(settings: MeshSettings) -> Mesh | None:
  """The mesh of the settings; None for one device."""
  size = settings.population * settings.model
  if size == 1:
    return None
  devices = jax.devices()
  if size > len(devices):
    raise ConfigError(
      f"mesh: expected at most {len(devices)} devices, which is what there is, "
      f"got {settings.population} x {settings.model}"
    )
  return make_mesh(population=settings.population, model=settings.model, devices=devices[:size])


def needs_sandbox(tasks: Sequence[Task | Episode]) -> bool:
  """Whether answers to some task are executed in the sandbox; services isolate by themselves, or refuse."""
  return any(isinstance(harness, Harness) for harness in harnesses_of(tasks))


@contextlib.contextmanager
def open_context(
  files: RunFiles,
  settings: ExperimentSettings,
  problem: TextProblem,
  interface: TextInterface,
  console: Console,
  interrupt: Interrupt,
) -> Iterator[RunContext]:
  """Models and history of a run."""
  folders = open_folders(settings)
  names = problem.task_names
  if folders is None:
    writer = HubWriter(interface, str((files.models / "base").absolute()))
    root = _trained(files, settings, problem, writer, console, interrupt)
    parents = {"base": Parent("the miniature base of the run", None)}
    experts: tuple[str, ...] = names
  else:
    files.check_models(folders.fingerprints())
    root = _from_folders(files, settings, folders, console)
    writer = HubWriter(interface, str(settings.base))
    experts = names_of_experts(settings, names)
    places = dict(zip(experts, settings.experts, strict=True))
    parents = {"base": parent_of(folders.base.folder), **{name: parent_of(place) for name, place in places.items()}}
  with History(files.history, names) as history:
    yield RunContext(
      files=files,
      console=console,
      problem=problem,
      root=root,
      history=history,
      interrupt=interrupt,
      output=settings.output,
      seed=settings.seed,
      budget=settings.evolution.children,
      swarm_sizes=settings.swarm_sizes,
      expert_names=experts,
      writer=writer,
      parents=parents,
      mesh=mesh_of(settings.mesh),
    )


def names_of_experts(settings: ExperimentSettings, task_names: tuple[str, ...]) -> tuple[str, ...]:
  """The experts' names: those of the tasks where there is one each, else those of their folders."""
  return name_experts([folder.name for folder in settings.experts], task_names)


def reads_in_core(settings: ExperimentSettings) -> tuple[int | None, bool] | None:
  """The rank in which large experts are read, and whether the base is shared; None: dense.

  Nothing dense is made of experts that evolution does not need dense, also not for plain merges.
  """
  make = resolve("genotype", settings.evolution.genotype, "evolution.genotype")
  if unbound(make) is dense:
    return None
  bound = dict(settings.evolution.genotype.settings)
  rank = bound.get("rank", 16)
  return (rank or None), bool(bound.get("share_base", False))


def _trained(
  files: RunFiles,
  settings: ExperimentSettings,
  problem: TextProblem,
  writer: HubWriter,
  console: Console,
  interrupt: Interrupt,
) -> Space:
  """The miniature base and its experts. They are the run's own, in `models`, from the first session on."""
  names = list(problem.task_names)
  places = {"base": files.models / "base", **{name: files.models / f"expert-{name}" for name in names}}
  if not all(place.is_dir() for place in places.values()):
    base, experts = load_or_train(settings, problem, writer.interface, console, interrupt)
    for name, place in places.items():
      if not place.is_dir():
        about = {"kind": "base"} if name == "base" else {"kind": "expert", "task": name, "identity": names.index(name)}
        writer.whole(place, base if name == "base" else experts[name], about)
  for place in places.values():
    verify(place)
  base = load_pretrained(places["base"]).params
  experts = stack_task_vectors(base, {name: load_pretrained(places[name]).params for name in names})
  mesh = mesh_of(settings.mesh)
  return dense_space(base if mesh is None else place_replicated(base, mesh), experts)


def _from_folders(files: RunFiles, settings: ExperimentSettings, folders: Folders, console: Console) -> Space:
  """Base and experts of Hugging Face folders."""
  mesh, in_core = mesh_of(settings.mesh), reads_in_core(settings)
  base = load_base(folders, mesh, console)
  if in_core is None:
    return dense_space(base, dense_experts(folders, base, console))
  rank, share_base = in_core
  basis = keep_basis(files.path / BASIS, base, lambda: core_experts(folders, base, rank, console))
  return core_space(basis if mesh is None else place_basis(basis, mesh), share_base=share_base)
