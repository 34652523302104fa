"""`cqd evolve CONFIG --dry-run`: whether an experiment would run, what memory and how much work it takes.

Configs, headers and tokenizers are opened; of weights only those that must be compared with the base, as a stored copy
of its embedding.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from cqd_jax.config.settings import BaselineSettings, ConfigError, ExperimentSettings, check_settings
from cqd_jax.genotypes import group_leaves
from cqd_jax.hub.experts import Expert, open_expert
from cqd_jax.hub.load import ModelFolder, open_pretrained
from cqd_jax.models.hf_layout import param_shapes
from cqd_jax.run.context import check_questions, tasks_of
from cqd_jax.run.folders import Folders
from cqd_jax.run.loop import mesh_of
from cqd_jax.run.memory import Plan, human, table
from cqd_jax.run.text_interface import TextInterface, interface_of, miniature_interface
from cqd_jax.sandbox.sandbox import probe
from cqd_jax.tasks.task import Split, Task
from cqd_jax.trees import num_parameters

T = TypeVar("T")

DEVICE_GB = 80.0
USEFUL_FLOPS, BYTES_A_SECOND = 4e14, 2.5e12
"""What the estimate takes an accelerator to reach: some 40 % of the peak of one of 2022 in bfloat16, 75 % of its memory
bandwidth."""


def dry_run(settings: ExperimentSettings, console: Console) -> None:
  """Checks an experiment and tells what it takes.

  Raises:
    ConfigError: with everything that is wrong, a line each.
  """
  problems: list[str] = []

  def attempt(action: Callable[[], T]) -> T | None:
    try:
      return action()
    except (ValueError, OSError) as error:
      problems.append(str(error))
      return None

  attempt(lambda: mesh_of(settings.mesh))
  if settings.run_dir is not None and settings.run_dir.exists():
    problems.append(f"{settings.run_dir}: already exists")
  tasks = attempt(lambda: tasks_of(settings))
  attempt(lambda: check_settings(settings, len(settings.tasks.names)))
  if not settings.unsafe and (reason := probe()) is not None:
    problems.append(f"nothing isolates answers here: {reason}")
  folders, language = None, miniature_interface() if settings.base is None else None
  if settings.base is not None:
    place = settings.base
    base = attempt(lambda: open_pretrained(place))
    if base is None:
      problems += [f"{folder}: no such expert folder" for folder in settings.experts if not folder.is_dir()]
    else:
      opened = [attempt(functools.partial(open_expert, folder, base)) for folder in settings.experts]
      folders = Folders(base, tuple(expert for expert in opened if expert is not None))
      language = attempt(functools.partial(interface_of, base))
  if tasks is not None:
    own_tasks = tasks
    attempt(lambda: check_questions(own_tasks))
  questions = None
  if tasks is not None and language is not None:
    questions = attempt(functools.partial(_questions, tasks, language))
  if problems:
    raise ConfigError("this experiment cannot run:\n" + "\n".join(f"  {problem}" for problem in problems))
  assert tasks is not None
  assert language is not None
  assert questions is not None
  if folders is not None:
    console.print(_models_table(settings, folders))
  longest = max(map(max, questions.values()))
  console.print(_memory_table(settings, language, folders, longest))
  console.print(_work_table(settings, language, tasks, questions))
  context = language.settings.get("max_position_embeddings")
  if isinstance(context, int) and longest + settings.max_new_tokens > context:
    console.print(
      f"Mind: questions have up to {longest} tokens and answers up to {settings.max_new_tokens}; the model is for "
      f"{context}",
      highlight=False,
    )
  console.print("No weights were loaded, nothing was written; the experiment can run.", highlight=False)


def _models_table(settings: ExperimentSettings, folders: Folders) -> Table:
  shown = Table(title="Models")
  for column in ("", "folder", "what it is", "dtype", "on disk"):
    shown.add_column(column, overflow="fold", justify="right" if column == "on disk" else "left")
  base = folders.base
  shown.add_row("base", str(base.folder), _what(base), base.dtype.name, human(base.num_bytes))
  for task, expert in zip(settings.tasks.names, folders.experts, strict=True):
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


def _questions(tasks: tuple[Task, ...], language: TextInterface) -> dict[Split, list[int]]:
  """The numbers of tokens of all questions of the splits that are asked."""
  splits: tuple[Split, ...] = ("validation", "test")
  return {
    split: [len(language.encode(example.prompt)) for task in tasks for example in task.examples(split)]
    for split in splits
  }


def _memory_table(
  settings: ExperimentSettings, language: TextInterface, folders: Folders | None, prompt_tokens: int
) -> Table:
  evolution = settings.evolution
  rank = 0
  if evolution.genotype != "dense":
    whole = min(language.config.hidden_size, language.config.intermediate_size)
    of_full = evolution.rank or whole
    experts = folders.experts if folders is not None else (None,)
    rank = max(of_full if expert is None or expert.adapter is None else _rank(expert) for expert in experts)
  questions = len(settings.tasks.names) * settings.tasks.validation
  plan = Plan(
    name=settings.name if folders is None else folders.base.folder.name,
    config=language.config,
    rank=rank,
    experts=len(settings.tasks.names),
    elites=len(settings.tasks.names) + evolution.children,  # as many slots as individuals will ever be
    population=evolution.batch_size,
    group=math.gcd(evolution.batch_size, settings.candidates_per_batch),
    prompts=math.ceil(questions / settings.prompt_buckets),
    prompt_tokens=prompt_tokens,
    answer_tokens=settings.max_new_tokens,
    dtype="float32" if folders is None else folders.base.dtype.name,
    embeddings=folders is None or any(_changes_embeddings(expert) for expert in folders.experts),
    share_base=evolution.share_base,
    elite_bytes=_elite_bytes(settings, language),
    written_out=_written_out(settings),
    unstacked=False,
  )
  return table(plan, DEVICE_GB)


def _elite_bytes(settings: ExperimentSettings, language: TextInterface) -> int | None:
  """Of an individual that is merge coefficients; None: it is another one."""
  evolution = settings.evolution
  if evolution.genotype != "coefficients":
    return None
  groups = group_leaves(param_shapes(language.config), evolution.coefficient_granularity)
  return 4 * len(settings.tasks.names) * groups.size


def _written_out(settings: ExperimentSettings) -> int:
  """The most models that are written out at the same time: a batch of children, of a search, or all that there is at
  the beginning."""
  evolution, baselines = settings.evolution, settings.baselines
  starts = len(evolution.coefficient_starts) if evolution.genotype == "coefficients" else 0
  beginning = len(settings.tasks.names) + starts
  return max(evolution.batch_size, beginning, baselines.batch_size if _num_searches(baselines) else 0)


def _num_searches(baselines: BaselineSettings) -> int:
  return sum((baselines.random_search, baselines.cma_es_model, baselines.cma_es_kernel, baselines.nsga2_model))


def _changes_embeddings(expert: Expert) -> bool:
  return expert.adapter is None or bool(expert.adapter.modules.keys() & {"lm_head", "model.embed_tokens"})


def _work_table(
  settings: ExperimentSettings, language: TextInterface, tasks: tuple[Task, ...], questions: dict[Split, list[int]]
) -> Table:
  """Models to be scored, tokens, and what that takes; answers are counted as long as they may be."""
  baselines, children = settings.baselines, settings.evolution.children
  searches = _num_searches(baselines)
  shown = Table(title="Work, at most (answers are counted as long as they may be)")
  for column in ("stage", "models", "answers", "tokens read", "tokens written", "FLOPs", "time on one accelerator"):
    shown.add_column(column, justify="left" if column == "stage" else "right")
  parameters = num_parameters(param_shapes(language.config))
  stages: list[tuple[str, int, Split]] = [
    ("evolving", len(tasks) + children, "validation"),
    ("comparing", len(baselines.scales) + searches * children, "validation"),
    ("final table", _rows(baselines, len(tasks), searches) + sum(settings.swarm_sizes[-1:]) * (2 + searches), "test"),
  ]
  total = 0.0
  for name, models, split in stages:
    answers = models * len(questions[split])
    read, written = models * sum(questions[split]), answers * settings.max_new_tokens
    flops = 2.0 * parameters * (read + written)
    # a step of decoding reads all weights once for a bucket of prompts
    steps = models * settings.prompt_buckets * settings.max_new_tokens
    if settings.evolution.share_base:
      steps = math.ceil(steps / settings.candidates_per_batch)
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


def _rows(baselines: BaselineSettings, num_tasks: int, searches: int) -> int:
  return 1 + num_tasks + 1 + bool(baselines.scales) + searches + 2
