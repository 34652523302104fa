"""Searches without archives, as baselines: random search, and CMA-ES by QDax, both by ask and tell on plain vectors."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from qdax.baselines.cmaes import CMAES, CMAESState

from cqd_jax.types import PRNGKey

SearchState: TypeAlias = CMAESState | None


class VectorSearch(NamedTuple):
  """A search over vectors of length D that maximises one fitness.

  Attributes:
    state: before the first batch.
    ask: (state, key) -> candidates `[P, D]` float32.
    tell: (state, candidates `[P, D]`, fitnesses `[P]`) -> state. Candidates without a finite fitness rank last.
  """

  state: SearchState
  ask: Callable[[SearchState, PRNGKey], Array]
  tell: Callable[[SearchState, Array, Array], SearchState]


def random_search(dimension: int, *, batch_size: int, low: float, high: float) -> VectorSearch:
  """Draws every candidate from the uniform distribution on the box `[low, high]^D`.

  Raises:
    ValueError: if the box or the batch is empty.
  """
  _check_sizes(dimension, batch_size)
  if not low < high:
    raise ValueError(f"low, high: expected low < high, got {low}, {high}")

  def ask(state: SearchState, key: PRNGKey) -> Array:
    del state
    return jax.random.uniform(key, (batch_size, dimension), minval=low, maxval=high)

  return VectorSearch(None, jax.jit(ask), lambda state, candidates, fitnesses: state)


def cma_es(mean: Float[Array, "D"] | Float[np.ndarray, "D"], *, batch_size: int, step_size: float) -> VectorSearch:
  """CMA-ES (Hansen 2016, arXiv:1604.00772) by QDax, from `mean` with the given initial step size.

  The better half of a batch updates the distribution.

  Raises:
    ValueError: if the batch has fewer than two candidates or the step size is not above 0.
  """
  _check_sizes(mean.shape[0], batch_size)
  if batch_size < 2:
    raise ValueError(f"batch_size: CMA-ES ranks candidates, so expected at least 2, got {batch_size}")
  if not step_size > 0:
    raise ValueError(f"step_size: expected more than 0, got {step_size}")
  # QDax's code promotes ranks and builds constants eagerly; both are its own business.
  with jax.numpy_rank_promotion("allow"):
    algorithm = CMAES(
      population_size=batch_size,
      search_dim=mean.shape[0],
      fitness_function=None,  # only its `update` would ask it
      init_sigma=step_size,
      mean_init=jnp.asarray(mean, jnp.float32),
    )
    initial = jax.tree.map(jnp.asarray, algorithm.init())

  @jax.jit
  def ask(state: SearchState, key: PRNGKey) -> Array:
    with jax.numpy_rank_promotion("allow"):
      return algorithm.sample(state, key)

  @jax.jit
  def tell(state: SearchState, candidates: Array, fitnesses: Array) -> SearchState:
    ranked = jnp.argsort(jnp.where(jnp.isfinite(fitnesses), -fitnesses, jnp.inf))
    with jax.numpy_rank_promotion("allow"):
      return algorithm.update_state(state, candidates[ranked[: batch_size // 2]])

  return VectorSearch(initial, ask, tell)


def _check_sizes(dimension: int, batch_size: int) -> None:
  if dimension < 1 or batch_size < 1:
    raise ValueError(f"dimension, batch_size: expected at least 1, got {dimension}, {batch_size}")
