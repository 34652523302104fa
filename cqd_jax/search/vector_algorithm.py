"""Searches over plain vectors as an `Algorithm`, whose genotypes are arrays `[E, G]`: merge coefficients."""

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes.space import Space, population_size
from cqd_jax.search.algorithm import Info, Population
from cqd_jax.search.vector_search import VectorSearch
from cqd_jax.tasks.problem import Scored
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey

MakeSearch: TypeAlias = Callable[[int], VectorSearch]
"""A search over vectors of the given length."""


class VectorState(flax.struct.PyTreeNode):
  """What a vector search goes on from; N is the most candidates that it will ever score.

  Attributes:
    search: state of the search.
    candidates: float32 `[N, ...]`, all so far, in order.
    values: float32 `[N, K, B]`; NaN where none was scored yet.
    scores: float32 `[N, K]`.
    count: int32, how many there are.
    first: int32, the identity of the first.
  """

  search: Any
  candidates: ArrayField
  values: ArrayField
  scores: ArrayField
  count: ArrayField
  first: ArrayField


class VectorAlgorithm:
  """A `VectorSearch` over the numbers of one genotype; it offers every candidate that it scored.

  The initial population of the space is scored, as for every method, and not used: the search begins where it says.

  Args:
    make: the search for vectors of a given length.
    space: whose genotypes are one float array each.
    batch_size: P, candidates that the search asks for at a time.
    budget: candidates that it will score.

  Raises:
    ValueError: if the genotypes of `space` are no single arrays.
  """

  def __init__(self, make: MakeSearch, *, space: Space, batch_size: int, budget: int):
    if not isinstance(space.initial, jax.Array):
      raise ValueError(f"genotype: expected coefficients, one array per individual, got {space.name}")
    self.space = space
    self._shape = space.initial.shape[1:]
    self._search = make(int(np.prod(self._shape)))
    self._budget = budget
    self.batch_size = batch_size
    self._size = -(-budget // self.batch_size) * self.batch_size

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> VectorState:
    """See `Algorithm`."""
    del key
    _, num_tasks, num_samples = scored.values.shape
    return VectorState(
      search=jax.tree.map(_strongly_typed, self._search.state),
      candidates=jnp.zeros((self._size, *self._shape), jnp.float32),
      values=jnp.full((self._size, num_tasks, num_samples), jnp.nan, jnp.float32),
      scores=jnp.full((self._size, num_tasks), jnp.nan, jnp.float32),
      count=jnp.int32(0),
      first=jnp.int32(population_size(initial)),
    )

  def ask(self, state: VectorState, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`."""
    candidates = self._search.ask(state.search, key)
    return candidates.reshape(-1, *self._shape), Info()

  def tell(self, state: VectorState, genotypes: Genotype, scored: Scored, info: Info) -> tuple[VectorState, Metrics]:
    """See `Algorithm`; the one figure is the best mean so far."""
    del info
    scored = scored.with_scores()
    flat = genotypes.reshape(genotypes.shape[0], -1)

    def write(buffer: jax.Array, batch: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(buffer, batch.astype(buffer.dtype), state.count, axis=0)

    scores = write(state.scores, scored.scores)
    means = scores.mean(axis=-1)
    state = state.replace(
      search=self._search.tell(state.search, flat, scored.scores),
      candidates=write(state.candidates, genotypes),
      values=write(state.values, scored.values),
      scores=scores,
      count=state.count + genotypes.shape[0],
    )
    return state, {"best_mean": jnp.where(jnp.isfinite(means), means, -jnp.inf).max()}

  def population(self, state: VectorState) -> Population:
    """Every candidate that was scored, in order."""
    count = min(int(state.count), self._budget)
    return Population(
      genotypes=state.candidates[:count],
      values=np.asarray(state.values)[:count],
      identities=int(state.first) + np.arange(count),
      scores=np.asarray(state.scores)[:count],
    )


def _strongly_typed(leaf: jax.Array) -> jax.Array:
  """A copy whose type no Python number decides, or programs would be compiled again for the second batch."""
  return jnp.array(leaf, dtype=leaf.dtype, copy=True)
