"""The base model and its experts: trained once for each setting, then kept in the cache."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from pydantic import TypeAdapter
from rich.console import Console

from cqd_jax.config.settings import ExperimentSettings, TrainingSettings
from cqd_jax.engines.text_interface import TextInterface
from cqd_jax.genotypes.space import Space
from cqd_jax.operators import task_vector
from cqd_jax.store.params import load_params, save_params
from cqd_jax.tasks.problem import task_scores
from cqd_jax.tasks.skills.training import MINIATURE, Trainer
from cqd_jax.tasks.task import Example
from cqd_jax.tasks.text import TextProblem
from cqd_jax.terminal.interrupt import Interrupt
from cqd_jax.terminal.progress import progress
from cqd_jax.types import Genotype, Params

FIRST_CHECK, STEPS_BETWEEN_CHECKS = 24, 4
RECIPE = 2
"""Raised whenever training changes in a way that its settings do not show, so that no stale expert is reused."""


def load_or_train(
  settings: ExperimentSettings,
  problem: TextProblem,
  interface: TextInterface,
  console: Console,
  interrupt: Interrupt,
) -> tuple[Params, dict[str, Params]]:
  """The params of the base, and of each task's expert by the task's name.

  Each model is kept in the cache as soon as it is trained, so that training goes on where it was ended.

  Raises:
    ValueError: if a cached file is damaged, naming it.
    Stopped: if somebody asked for it.
  """
  examples = dict(zip(problem.task_names, problem.examples("train"), strict=True))
  folder = settings.cache_dir / _fingerprint(settings, problem, examples)
  paths = {name: folder / f"{name}.safetensors" for name in ("base", *examples)}
  if all(path.is_file() for path in paths.values()):
    console.print(f"base and experts: from {folder}", highlight=False)
  trainer = Trainer(interface.config, batch_size=settings.training.rows, row_length=settings.training.row_length)
  if not paths["base"].is_file():
    base = _train_base(settings, trainer, examples, problem, console, interrupt)
    save_params(paths["base"], base)
  base = _load_cached(paths["base"])
  for index, (name, own) in enumerate(examples.items()):
    if not paths[name].is_file():
      save_params(paths[name], _train_expert(settings, trainer, base, name, own, index, console, interrupt))
  return base, {name: _load_cached(paths[name]) for name in examples}


def stack_task_vectors(base: Params, experts: Mapping[str, Params]) -> Params:
  """The experts' differences to the base, leaves `[K, ...]`."""
  task_vectors = [task_vector(expert, base) for expert in experts.values()]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *task_vectors)


def _load_cached(path: Path) -> Params:
  try:
    return load_params(path)
  except ValueError as error:
    raise ValueError(f"{error}; delete it to have it made again") from error


def _train_base(
  settings: ExperimentSettings,
  trainer: Trainer,
  examples: dict[str, list[Example]],
  problem: TextProblem,
  console: Console,
  interrupt: Interrupt,
) -> Params:
  """Trains on the mixture, until the base knows the format but not the skills."""
  training = settings.training
  mixture = [example for own in examples.values() for example in own]
  with progress(console, "training the base", training.base_schedule_steps) as advance:

    def finished(steps: int, params: Params) -> bool:
      interrupt.check()
      if steps < FIRST_CHECK or steps % STEPS_BETWEEN_CHECKS:
        advance()
        return False
      score = float(task_scores(problem.score("validation", *as_population(params)).values).mean())
      advance(note=f"validation {score:.3f}")
      return score >= training.base_stop_at

    return trainer.fit(
      trainer.init(jax.random.split(jax.random.key(settings.seed), 3)[0]),
      mixture,
      steps=training.base_schedule_steps,
      schedule_steps=training.base_schedule_steps,
      peak=training.base_learning_rate,
      seed=settings.seed,
      finished=finished,
    )


def _train_expert(
  settings: ExperimentSettings,
  trainer: Trainer,
  base: Params,
  name: str,
  examples: list[Example],
  index: int,
  console: Console,
  interrupt: Interrupt,
) -> Params:
  """Fine-tunes the base on one task."""
  training = settings.training
  with progress(console, f"training expert {name}", training.expert_steps) as advance:

    def count(steps: int, params: Params) -> bool:
      del steps
      interrupt.check()
      jax.block_until_ready(params)  # else the bar would run ahead of the training
      advance()
      return False

    return trainer.fit(
      base,
      examples,
      steps=training.expert_steps,
      schedule_steps=training.expert_steps,
      peak=training.expert_learning_rates[index],
      seed=settings.seed * 1000 + index + 1,
      finished=count,
    )


def as_population(params: Params) -> tuple[Genotype, Space]:
  """A model that is not written as a difference, as a population of one; its weights stay where they are."""
  population = jax.tree.map(lambda leaf: leaf[None], params)
  return population, whole_models(population)


def whole_models(population: Genotype) -> Space:
  """The space of models that are not written as differences."""
  return Space("whole", "elementwise", base=population, initial=population, materialize=lambda models: models)


def _fingerprint(settings: ExperimentSettings, problem: TextProblem, examples: dict[str, list[Example]]) -> str:
  """Names all that the weights depend on; the order of the tasks, which learning rates and seeds follow, as well."""
  content = {
    "recipe": RECIPE,
    "seed": settings.seed,
    "training": TypeAdapter(TrainingSettings).dump_python(settings.training, mode="json"),
    "validation": problem.fingerprint("validation"),  # it decides when the base stops
    "model": str(MINIATURE),
    "examples": [[name, [(example.prompt, example.answer) for example in own]] for name, own in examples.items()],
  }
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
