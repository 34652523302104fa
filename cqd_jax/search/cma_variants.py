"""CMA-ES with more around it: a price on large numbers (LoraHub), and restarts where it has come to an end."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from cqd_jax.search.vector_search import VectorSearch
from cqd_jax.types import ArrayField, PRNGKey

SMALLEST_STEP = 0.01
"""Restarts: the largest standard deviation of a number, in units of the initial step size, at which a search has ended.

Merge coefficients that differ by less make the same model as far as a task can tell.
"""

SMALLEST_SPREAD = 1e-6
"""Restarts: the difference in fitness between the best and the worst of a batch at which a search has ended."""

REACH = 3.0
"""Restarts: how far from where the search began it may begin again, in units of the initial step size."""


class RestartState(flax.struct.PyTreeNode):
  """What a search with restarts goes on from.

  Attributes:
    search: a state of QDax's CMA-ES.
    num_restarts: int32, how many there were.
  """

  search: Any
  num_restarts: ArrayField


def within_bounds(search: VectorSearch, *, penalty: float, bound: float) -> VectorSearch:
  """A search on the box `[-bound, bound]^D` that pays `penalty` times the mean magnitude of a candidate.

  Candidates beyond the box are asked on its surface, and learned from there. Only `tell` knows of the price: whoever
  keeps the scores has them without.

  Raises:
    ValueError: if `penalty` is below 0 or `bound` not above 0.

  Reference: Huang et al. 2024, LoraHub, arXiv:2307.13269, and the program of its authors, with penalty 0.05 and bound
  1.5. Deviations: CMA-ES, where they let Nevergrad choose among its optimizers; the price is off the mean of the task
  scores, where theirs is on the loss.
  """
  if penalty < 0:
    raise ValueError(f"penalty: expected at least 0, got {penalty}")
  if not bound > 0:
    raise ValueError(f"bound: expected more than 0, got {bound}")

  def ask(state: Any, key: PRNGKey) -> Array:
    return jnp.clip(search.ask(state, key), -bound, bound)

  def tell(state: Any, candidates: Array, scores: Array) -> Any:
    price = penalty * jnp.abs(candidates).mean(axis=-1, keepdims=True)
    return search.tell(state, candidates, scores - price)

  return VectorSearch(search.state, ask, tell)


def with_restarts(search: VectorSearch) -> VectorSearch:
  """CMA-ES that begins again once it has come to an end, with as many candidates per batch as before.

  It has ended where the standard deviation of no number exceeds `SMALLEST_STEP`, where the fitness of at least two
  candidates of a batch is known and differs by no more than `SMALLEST_SPREAD`, or where its distribution is no longer
  finite. It then begins with its first distribution moved to a random point of the box of `REACH` about where it began.
  The r-th of these points is the same in every run; what is drawn from there is not.

  Args:
    search: `vector_search.cma_es`.

  Reference: Auger & Hansen 2005, "A restart CMA evolution strategy with increasing population size", whose batches
  double with each restart; here a batch is as large as the run has it.
  """
  first = search.state

  def ask(state: RestartState, key: PRNGKey) -> Array:
    return search.ask(state.search, key)

  @jax.jit
  def tell(state: RestartState, candidates: Array, scores: Array) -> RestartState:
    learned = search.tell(state.search, candidates, scores)
    number = state.num_restarts + 1
    offsets = jax.random.uniform(jax.random.fold_in(jax.random.key(0), number), first.mean.shape, minval=-1.0)
    fresh = first.replace(mean=first.mean + REACH * first.sigma * offsets)
    ended = _has_ended(learned, scores, first.sigma)
    search_state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, learned)
    return RestartState(search_state, jnp.where(ended, number, state.num_restarts))

  return VectorSearch(RestartState(first, jnp.int32(0)), ask, tell)


def _has_ended(state: Any, scores: Array, step_size: Array) -> Array:
  """Whether there is nothing more to find where the search is."""
  fitnesses = scores.mean(axis=-1)
  known = jnp.isfinite(fitnesses)
  spread = jnp.where(known, fitnesses, -jnp.inf).max() - jnp.where(known, fitnesses, jnp.inf).min()
  flat = (known.sum() >= 2) & (spread <= SMALLEST_SPREAD)
  largest = state.sigma * jnp.sqrt(jnp.diag(state.cov_matrix).max())
  broken = ~jnp.isfinite(largest) | ~jnp.isfinite(state.mean).all()
  return flat | broken | (known.any() & (largest <= SMALLEST_STEP * step_size))
