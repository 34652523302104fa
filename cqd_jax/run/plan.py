"""`cqd evolve CONFIG --dry-run`: whether an experiment would run; the memory, disk and work it takes.

Configs, headers and tokenizers are opened; of weights only those that must be compared with the base, as a stored copy
of its embedding. Nothing is executed, so it needs no sandbox.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from cqd_jax.config.settings import ConfigError, ExperimentSettings, check_settings
from cqd_jax.engines.text_interface import TextInterface, interface_of, miniature_interface
from cqd_jax.genotypes import group_leaves
from cqd_jax.hub.experts import Expert, open_expert
from cqd_jax.hub.load import ModelFolder, open_pretrained
from cqd_jax.models.hf_layout import param_shapes
from cqd_jax.run.files import check_places
from cqd_jax.run.folders import Folders
from cqd_jax.run.memory import Plan, human, num_bytes, table
from cqd_jax.run.rehearsal import Work, rehearse
from cqd_jax.run.text_run import check_questions, make_engine, mesh_of, names_of_experts, needs_sandbox, tasks_of
from cqd_jax.sandbox.sandbox import installed
from cqd_jax.tasks.episode import Episode, as_episode
from cqd_jax.tasks.task import AskedSplit, Split, Task
from cqd_jax.trees import num_parameters

T = TypeVar("T")

DEVICE_GB = 80.0
USEFUL_FLOPS, BYTES_A_SECOND = 4e14, 2.5e12
"""What the estimate takes an accelerator to reach: some 40 % of the peak of one of 2022 in bfloat16, 75 % of its memory
bandwidth."""


def dry_run(settings: ExperimentSettings, console: Console) -> None:
  """Checks an experiment and reports what it takes.

  Raises:
    ConfigError: with everything that is wrong, one line each.
  """
  problems: list[str] = []

  def attempt(action: Callable[[], T]) -> T | None:
    try:
      return action()
    except (ValueError, OSError) as error:
      problems.append(str(error))
      return None

  attempt(lambda: mesh_of(settings.mesh))
  attempt(lambda: check_places(settings))
  if settings.run_dir is not None and settings.run_dir.exists():
    problems.append(f"{settings.run_dir}: already exists")
  tasks = attempt(lambda: tasks_of(settings))
  attempt(lambda: check_settings(settings, len(settings.tasks.names)))
  folders, interface = None, miniature_interface() if settings.base is None else None
  if settings.base is not None:
    place = settings.base
    base = attempt(lambda: open_pretrained(place))
    if base is None:
      problems += [f"{folder}: no such expert folder" for folder in settings.experts if not folder.is_dir()]
    else:
      opened = [attempt(functools.partial(open_expert, folder, base)) for folder in settings.experts]
      folders = Folders(base, tuple(expert for expert in opened if expert is not None))
      interface = attempt(functools.partial(interface_of, base))
  if tasks is not None:
    own_tasks = tasks
    attempt(lambda: check_questions(own_tasks))
  questions, work = None, None
  if tasks is not None and interface is not None:
    attempt(functools.partial(make_engine, settings, interface))
    if not problems:
      work = attempt(functools.partial(rehearse, settings, interface, len(tasks)))
    labels = settings.tasks.labels if work is not None and any(own.teachers for own in work) else 0
    questions = attempt(functools.partial(_questions, settings, labels, tasks, interface))
  if problems:
    raise ConfigError("this experiment cannot run:\n" + "\n".join(f"  {problem}" for problem in problems))
  assert tasks is not None
  assert interface is not None
  assert questions is not None
  assert work is not None
  if folders is not None:
    console.print(_models_table(settings, folders))
  longest = max(question.longest for asked in questions.values() for question in asked)
  console.print(_memory_table(settings, interface, folders, longest))
  console.print(_disk_table(settings, interface, folders))
  console.print(_work_table(settings, interface, work, questions))
  context = interface.settings.get("max_position_embeddings")
  if isinstance(context, int) and longest + settings.max_new_tokens > context:
    console.print(
      f"Mind: dialogues have up to {longest} tokens before an answer of up to {settings.max_new_tokens}; the model is "
      f"for {context}, and what is longer fails",
      highlight=False,
    )
  if needs_sandbox(tasks) and not settings.unsafe and not installed():
    console.print(
      "Mind: nothing isolates answers here (bubblewrap is not installed), so evolve will refuse", highlight=False
    )
  console.print("No weights were loaded, nothing was written; the experiment can run.", highlight=False)


def _models_table(settings: ExperimentSettings, folders: Folders) -> Table:
  shown = Table(title="Models")
  for column in ("", "folder", "what it is", "dtype", "on disk"):
    shown.add_column(column, overflow="fold", justify="right" if column == "on disk" else "left")
  base = folders.base
  shown.add_row("base", str(base.folder), _what(base), base.dtype.name, human(base.num_bytes))
  names = names_of_experts(settings, tuple(plug.use for plug in settings.tasks.names))
  for task, expert in zip(names, folders.experts, strict=True):
    what = expert.kind if expert.adapter is None else f"LoRA adapter of rank {_rank(expert)}"
    shown.add_row(f"expert {task}", str(expert.folder), what, _dtype(expert), human(expert.num_bytes))
  return shown


def _what(base: ModelFolder) -> str:
  architecture = base.content["architectures"][0] if base.content.get("architectures") else base.content["model_type"]
  return f"{architecture}, {num_parameters(base.shapes()):,} parameters"


def _rank(expert: Expert) -> int:
  assert expert.adapter is not None
  return max((module.a.shape[0] for module in expert.adapter.modules.values()), default=0)


def _dtype(expert: Expert) -> str:
  if expert.model is not None:
    return expert.model.dtype.name
  assert expert.adapter is not None
  return next(iter(expert.adapter.modules.values())).a.dtype.name if expert.adapter.modules else ""


class _Question(NamedTuple):
  """What a dialogue may take; what it gets to hear is not counted.

  Attributes:
    tokens: with which it begins.
    turns: answers that it may have.
    new: tokens that each may have.
  """

  tokens: int
  turns: int
  new: int

  @property
  def longest(self) -> int:
    """Tokens before the last answer."""
    return self.tokens + (self.turns - 1) * self.new

  @property
  def read(self) -> int:
    """Tokens in all, since each turn reads the dialogue so far."""
    return self.turns * (self.tokens + self.longest) // 2

  @property
  def written(self) -> int:
    """Tokens of all answers."""
    return self.turns * self.new


def _questions(
  settings: ExperimentSettings, labels: int, tasks: tuple[Task | Episode, ...], interface: TextInterface
) -> dict[AskedSplit, list[_Question]]:
  """All dialogues of the splits that are asked."""

  def of(split: Split, most: int | None = None) -> list[_Question]:
    return [
      _Question(
        len(interface.encode(episode.opening(example))),
        episode.max_turns,
        int(getattr(episode, "max_new_tokens", settings.max_new_tokens)),
      )
      for episode in map(as_episode, tasks)
      for example in episode.examples(split)[:most]
    ]

  asked: dict[AskedSplit, list[_Question]] = {"validation": of("validation"), "test": of("test")}
  return {**asked, "labels": of("train", labels)} if labels else asked


def _memory_table(
  settings: ExperimentSettings, interface: TextInterface, folders: Folders | None, prompt_tokens: int
) -> Table:
  return table(_plan(settings, interface, folders, prompt_tokens), DEVICE_GB)


def _plan(settings: ExperimentSettings, interface: TextInterface, folders: Folders | None, prompt_tokens: int) -> Plan:
  evolution, genotype = settings.evolution, settings.evolution.genotype
  rank = 0
  if genotype.use != "dense":
    whole = min(interface.config.hidden_size, interface.config.intermediate_size)
    of_full = genotype.settings.get("rank", 16) or whole
    experts = folders.experts if folders is not None else (None,)
    rank = max(of_full if expert is None or expert.adapter is None else _rank(expert) for expert in experts)
  num_experts = _num_experts(settings)
  group = int(settings.engine.settings.get("candidates_per_batch", 1))
  questions = len(settings.tasks.names) * settings.tasks.validation
  return Plan(
    name=settings.name if folders is None else folders.base.folder.name,
    config=interface.config,
    rank=rank,
    experts=num_experts,
    elites=num_experts + evolution.children,  # as many slots as individuals will ever be
    population=evolution.batch_size,
    group=group,
    prompts=math.ceil(questions / int(settings.engine.settings.get("prompt_buckets", 6))),
    prompt_tokens=prompt_tokens,
    answer_tokens=settings.max_new_tokens,
    dtype="float32" if folders is None else folders.base.dtype.name,
    embeddings=folders is None or any(_changes_embeddings(expert) for expert in folders.experts),
    share_base=bool(genotype.settings.get("share_base", False)),
    elite_bytes=_elite_bytes(settings, interface),
    written_out=group,
    unstacked=False,
  )


def _elite_bytes(settings: ExperimentSettings, interface: TextInterface) -> int | None:
  """Of an individual that is merge coefficients; None: it is another one."""
  genotype = settings.evolution.genotype
  if genotype.use != "coefficients":
    return None
  groups = group_leaves(param_shapes(interface.config), str(genotype.settings.get("granularity", "kernel")))
  return 4 * _num_experts(settings) * groups.size


def _num_experts(settings: ExperimentSettings) -> int:
  return len(settings.experts) or len(settings.tasks.names)


def _disk_table(settings: ExperimentSettings, interface: TextInterface, folders: Folders | None) -> Table:
  """What the run directory will hold at most."""
  plan = _plan(settings, interface, folders, 1)
  parts = num_bytes(plan)
  whole, elite = parts["base model"], parts["archives"] // plan.elites
  output = settings.output
  models = {"all": plan.elites, "best": len(settings.tasks.names), "none": 0}[output.elites] + 2
  trained = 0 if folders is not None else 1 + plan.experts
  adapters = output.form == "adapters"
  each = elite if adapters and plan.rank and plan.elite_bytes is None else whole
  rows = {
    "models": (models * each + trained * whole, f"{models} {'adapters' if adapters else 'whole models'} at most"),
    "checkpoints": (output.checkpoints_kept * parts["archives"], f"the last {output.checkpoints_kept}"),
    "core space": (parts.get("bases", 0) + (parts["experts"] if plan.rank else 0), "bases and experts"),
  }
  shown = Table(title="Disk, at most")
  for column in ("part", "bytes", "what it is"):
    shown.add_column(column, justify="right" if column == "bytes" else "left")
  for name, (size, what) in rows.items():
    if size:
      shown.add_row(name, human(size), what)
  shown.add_section()
  shown.add_row("in all", human(sum(size for size, _ in rows.values())), str(settings.run_dir or settings.runs_dir))
  return shown


def _changes_embeddings(expert: Expert) -> bool:
  return expert.adapter is None or bool(expert.adapter.modules.keys() & {"lm_head", "model.embed_tokens"})


def _work_table(
  settings: ExperimentSettings,
  interface: TextInterface,
  work: Sequence[Work],
  questions: dict[AskedSplit, list[_Question]],
) -> Table:
  """Models to be scored, tokens, and what that takes; answers are counted as long as they may be."""
  rows = 1 + _num_experts(settings) + 1 + len(work) + 1
  shown = Table(title="Work, at most (answers are counted as long and as many as they may be)")
  for column in ("stage", "models", "answers", "tokens read", "tokens written", "FLOPs", "time on one accelerator"):
    shown.add_column(column, justify="left" if column == "stage" else "right")
  parameters = num_parameters(param_shapes(interface.config))
  stages: list[tuple[str, int, AskedSplit]] = [
    ("evolving", _num_experts(settings) + work[0].budget, "validation"),
    ("comparing", sum(own.budget for own in work[1:]), "validation"),
    ("labels", max(own.teachers for own in work), "labels"),
    ("final table", rows + max(settings.swarm_sizes, default=0) * (1 + len(work)), "test"),
  ]
  total = 0.0
  for name, models, split in stages:
    if not models:
      continue
    asked = questions[split]
    answers = models * sum(question.turns for question in asked)
    read, written = (models * sum(each) for each in zip(*((each.read, each.written) for each in asked), strict=True))
    flops = 2.0 * parameters * (read + written)
    # a step of decoding reads all weights once for a bucket of prompts
    steps = models * int(settings.engine.settings.get("prompt_buckets", 6)) * max(each.written for each in asked)
    if settings.evolution.genotype.settings.get("share_base"):
      steps = math.ceil(steps / int(settings.engine.settings.get("candidates_per_batch", 1)))
    hours = max(flops / USEFUL_FLOPS, steps * 2.0 * parameters / BYTES_A_SECOND) / 3600
    total += hours
    shown.add_row(name, f"{models:,}", f"{answers:,}", f"{read:,}", f"{written:,}", f"{flops:.2g}", _duration(hours))
  shown.caption = (
    f"{_duration(total)} in all, an estimate: the larger of FLOPs at {USEFUL_FLOPS:.0e} a second and of reading all "
    f"weights in bfloat16 for each token at {human(BYTES_A_SECOND)} a second. Executing the answers comes on top."
  )
  return shown


def _duration(hours: float) -> str:
  if hours >= 1:
    return f"{hours:,.1f} h"
  return f"{60 * hours:.0f} min" if hours >= 1 / 60 else "less than a minute"
