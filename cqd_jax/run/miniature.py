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
from cqd_jax.operators import task_vector
from cqd_jax.run.context import Suite
from cqd_jax.store.params import load_params, save_params
from cqd_jax.tasks.evaluation import Evaluation
from cqd_jax.tasks.skills.training import MINIATURE, Trainer
from cqd_jax.tasks.task import Example
from cqd_jax.terminal.interrupt import Interrupt
from cqd_jax.terminal.progress import progress
from cqd_jax.types import Params, PRNGKey

FIRST_CHECK, STEPS_BETWEEN_CHECKS = 24, 4
RECIPE = 1
"""Raised whenever training changes in a way that its settings do not tell, so that no stale expert is reused."""


def load_or_train(
  settings: ExperimentSettings,
  suite: Suite,
  key: PRNGKey,
  console: Console,
  interrupt: Interrupt,
) -> tuple[Params, dict[str, Params]]:
  """The params of the base, and of each task's expert by the task's name.

  Each model is kept in the cache as soon as it is trained, so that training goes on where it was ended.

  Raises:
    ValueError: if a cached file is damaged, naming it.
    Stopped: if somebody asked for it.
  """
  examples = {task.name: list(task.examples("train")) for task in suite.tasks}
  folder = settings.cache_dir / _fingerprint(settings, examples)
  paths = {name: folder / f"{name}.safetensors" for name in ("base", *examples)}
  if all(path.is_file() for path in paths.values()):
    console.print(f"base and experts: from {folder}", highlight=False)
  trainer = Trainer(MINIATURE, batch_size=settings.training.rows, row_length=settings.training.row_length)
  if not paths["base"].is_file():
    base = _train_base(settings, trainer, examples, suite.validation, key, console, interrupt)
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
    raise ValueError(f"{error}; delete it to have it made anew") from error


def _train_base(
  settings: ExperimentSettings,
  trainer: Trainer,
  examples: dict[str, list[Example]],
  validation: Evaluation,
  key: PRNGKey,
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
      score = float(validation(jax.tree.map(lambda leaf: leaf[None], params)).mean())
      advance(note=f"validation {score:.3f}")
      return score >= training.base_stop_at

    return trainer.fit(
      trainer.init(key),
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


def _fingerprint(settings: ExperimentSettings, examples: dict[str, list[Example]]) -> str:
  """Names all that the weights depend on."""
  content = {
    "recipe": RECIPE,
    "seed": settings.seed,
    "training": TypeAdapter(TrainingSettings).dump_python(settings.training, mode="json"),
    "validation": settings.tasks.validation,  # it decides when the base stops
    "max_new_tokens": settings.max_new_tokens,
    "model": str(MINIATURE),
    "examples": {name: [(example.prompt, example.answer) for example in own] for name, own in examples.items()},
  }
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
