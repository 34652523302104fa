"""The base model and its experts: trained once for each setting, then kept in the cache."""

import hashlib
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from pydantic import TypeAdapter
from rich.console import Console

from cqd_jax.config import ExperimentSettings, TrainingSettings
from cqd_jax.io.params import load_params, save_params
from cqd_jax.io.progress import progress
from cqd_jax.operators import task_vector
from cqd_jax.tasks.evaluation import Evaluation
from cqd_jax.tasks.skills.training import MINIATURE, Trainer
from cqd_jax.tasks.task import Example, Task
from cqd_jax.types import Params, PRNGKey

FIRST_CHECK, STEPS_BETWEEN_CHECKS = 24, 4
RECIPE = 1
"""Raised whenever training changes in a way that its settings do not tell, so that no stale expert is reused."""


def load_or_train(
  settings: ExperimentSettings, suite: Sequence[Task], validation: Evaluation, key: PRNGKey, console: Console
) -> tuple[Params, Params]:
  """The base params, and the experts' task vectors with leaves `[K, ...]`, one expert a task.

  Raises:
    ValueError: if there is not one expert learning rate a task, or a cached file is damaged.
  """
  if len(settings.training.expert_learning_rates) != len(suite):
    raise ValueError(
      f"training.expert_learning_rates: expected {len(suite)}, one a task, got "
      f"{settings.training.expert_learning_rates}"
    )
  examples = {task.name: list(task.examples("train")) for task in suite}
  folder = settings.cache_dir / _fingerprint(settings, examples)
  paths = {name: folder / f"{name}.safetensors" for name in ("base", *examples)}
  if all(path.is_file() for path in paths.values()):
    console.print(f"base and experts: from {folder}", highlight=False)
  else:
    trainer = Trainer(MINIATURE, batch_size=settings.training.rows, row_length=settings.training.row_length)
    base = _train_base(settings.training, trainer, examples, validation, key, settings.seed, console)
    for index, (name, own) in enumerate(examples.items()):
      expert = _train_expert(settings.training, trainer, base, name, own, index, settings.seed, console)
      save_params(paths[name], expert)
    save_params(paths["base"], base)  # last: with it the cache entry is whole
  base = load_params(paths["base"])
  experts = [task_vector(load_params(paths[name]), base) for name in examples]
  return base, jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


def _train_base(
  settings: TrainingSettings,
  trainer: Trainer,
  examples: dict[str, list[Example]],
  validation: Evaluation,
  key: PRNGKey,
  seed: int,
  console: Console,
) -> Params:
  """Trains on the mixture, until the base knows the format but not the skills."""
  mixture = [example for own in examples.values() for example in own]
  with progress(console, "training the base", settings.base_schedule_steps) as advance:

    def finished(steps: int, params: Params) -> bool:
      if steps < FIRST_CHECK or steps % STEPS_BETWEEN_CHECKS:
        advance()
        return False
      score = float(validation(jax.tree.map(lambda leaf: leaf[None], params)).mean())
      advance(note=f"validation {score:.3f}")
      return score >= settings.base_stop_at

    return trainer.fit(
      trainer.init(key),
      mixture,
      steps=settings.base_schedule_steps,
      schedule_steps=settings.base_schedule_steps,
      peak=settings.base_learning_rate,
      seed=seed,
      finished=finished,
    )


def _train_expert(
  settings: TrainingSettings,
  trainer: Trainer,
  base: Params,
  name: str,
  examples: list[Example],
  index: int,
  seed: int,
  console: Console,
) -> Params:
  """Fine-tunes the base on one task."""
  with progress(console, f"training expert {name}", settings.expert_steps) as advance:

    def count(steps: int, params: Params) -> bool:
      del steps
      jax.block_until_ready(params)  # else the bar would run ahead of the training
      advance()
      return False

    return trainer.fit(
      base,
      examples,
      steps=settings.expert_steps,
      schedule_steps=settings.expert_steps,
      peak=settings.expert_learning_rates[index],
      seed=seed * 1000 + index + 1,
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
