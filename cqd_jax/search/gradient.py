"""Gradient steps on individuals of any space: through whole weights, through cores, or through merge coefficients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from cqd_jax.genotypes.space import Space, population_of_one, take
from cqd_jax.low_rank import combine_shared, partition_shared
from cqd_jax.tasks.problem import TrainingSignal
from cqd_jax.types import Genotype, Params, PRNGKey

LARGEST_NORM = 1.0
"""To which the norm of a gradient is cut."""


class Descent(NamedTuple):
  """Where gradient descent has come to; a pytree.

  Attributes:
    genotype: leaves `[...]` of one individual.
    optimizer: Adam's moments.
  """

  genotype: Genotype
  optimizer: Any


def make_adam() -> optax.GradientTransformation:
  """Adam (Kingma & Ba 2015, arXiv:1412.6980) without its learning rate, after cutting the gradient's norm."""
  return optax.chain(optax.clip_by_global_norm(LARGEST_NORM), optax.scale_by_adam())


def begin_descent(genotype: Genotype) -> Descent:
  """From an individual, leaves `[...]`."""
  return Descent(genotype, make_adam().init(genotype))


def params_of(space: Space, genotype: Genotype) -> Params:
  """The params of ONE individual, leaves `[...]`; differentiable. A base that the space shares stays shared."""
  own, shared = partition_shared(space.scored_in.materialize(space.as_scored(population_of_one(genotype))))
  return combine_shared(take(own, 0), shared)


def descend(
  key: PRNGKey,
  descent: Descent,
  data: Any,
  task_weights: Float[Array, "K"],
  learning_rates: Float[Array, "S"],
  *,
  space: Space,
  signal: TrainingSignal,
) -> tuple[Descent, Float[Array, "S K"]]:
  """Takes S steps of Adam down the weighted sum of the tasks' losses, each on a batch of its own.

  Args:
    key: consumed.
    descent: where to go on from.
    data: of the signal; an argument, so that programs do not hold it.
    task_weights: how much each task's loss counts.
    learning_rates: of each step.
    space: what the genotype means.
    signal: draws batches and gives losses.

  Returns:
    Where it came to, and the losses before each step.
  """
  adam = make_adam()

  def weighted(genotype: Genotype, batch: Any) -> tuple[Array, Array]:
    losses = signal.loss(params_of(space, genotype), batch).astype(jnp.float32)
    return (losses * task_weights).sum(), losses

  def step(descent: Descent, now: tuple[Array, PRNGKey]) -> tuple[Descent, Array]:
    learning_rate, step_key = now
    (_, losses), gradient = jax.value_and_grad(weighted, has_aux=True)(descent.genotype, signal.draw(step_key, data))
    update, optimizer = adam.update(gradient, descent.optimizer, descent.genotype)
    update = jax.tree.map(lambda leaf: (-learning_rate * leaf).astype(leaf.dtype), update)
    genotype: Any = optax.apply_updates(descent.genotype, update)
    return Descent(genotype, optimizer), losses

  result: tuple[Descent, Array] = jax.lax.scan(
    step, descent, (learning_rates, jax.random.split(key, learning_rates.shape[0]))
  )
  return result


def cosine(learning_rate: float, steps: int, warm_up: int) -> Callable[[Array], Array]:
  """The learning rate by step: linear warm-up, then half a cosine down to nothing."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(warm_up, max(steps - 1, 1)), max(steps, 2))

  def at(step: Array) -> Array:
    rate: Array = jnp.asarray(schedule(step + 1), jnp.float32)
    return rate

  return at
