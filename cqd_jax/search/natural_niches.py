"""M2N2, model merging of natural niches: members share what a sample is worth, and partners are who adds most.

A population of N models keeps its value on every sample. What many solve is worth little to each of them, so those who
solve what others do not stay in the population and are parents more often; their partners solve what they do not.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from cqd_jax.genotypes.space import MakeSpace, Space, dense, population_size
from cqd_jax.operators.arithmetic import check_setting
from cqd_jax.operators.crossover import Child, line_crossover, slerp_crossover, split_slerp_crossover
from cqd_jax.operators.frames import check_frame
from cqd_jax.operators.mutation import expert_svd_mutation, no_mutation
from cqd_jax.search.algorithm import Algorithm, Info, Population, SearchContext
from cqd_jax.search.emitters import Crossover, Mutation
from cqd_jax.search.members import NOBODY
from cqd_jax.search.variation import in_words, unbound
from cqd_jax.tasks.problem import Scored
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey

USUAL_CROSSOVERS: dict[str, Crossover] = {
  "elementwise": split_slerp_crossover,
  "inner_product": slerp_crossover,
  "linear": line_crossover,
}
"""By what the space of the genotypes offers."""


def competition(values: Float[Array, "N K B"], *, alpha: ArrayLike = 1.0) -> Float[Array, "N"]:
  """The fitness of N members that share what each sample is worth.

  f_i = sum over all samples j of v_ij / z_j^alpha, where z_j = sum over members of v_ij. So a verdict that all members
  share is worth 1 / N to each, and one that only one member has is worth 1 to it.

  Args:
    values: `[N, K, B]` as in `Scored`; tasks with more samples weigh more. What is not finite or below 0 counts as 0.
    alpha: how much is shared: 1 all of it, 0 nothing (the fitness is then the sum of the values); may be traced.

  Returns:
    float32 `[N]`, at least 0.

  Reference: Abrantes et al. 2025, arXiv:2508.16204. A sample that nobody solves is worth 0, as in the authors' code,
  where the paper adds a small number to z^alpha. The worth of a sample is 1 if it is not shared (the paper's capacity).
  """
  return _shares(values, alpha).sum(axis=(1, 2))


def attraction(
  values: Float[Array, "N K B"], first: Int[ArrayLike, ""], *, alpha: ArrayLike = 1.0
) -> Float[Array, "N"]:
  """With which probability each member is the partner of `first`: by how much it adds.

  Proportional to g_i = sum over all samples j of max(0, (v_ij - v_first,j) / z_j^alpha), z as in `competition`.

  Args:
    values: `[N, K, B]` as in `competition`.
    first: which member looks for a partner; may be traced.
    alpha: as in `competition`.

  Returns:
    float32 `[N]` with sum 1; 0 for `first`. All zeros if nobody solves anything that `first` does not.

  Reference: Abrantes et al. 2025, arXiv:2508.16204.
  """
  shares = _shares(values, alpha)
  added = jnp.maximum(shares - shares[first][None], 0).sum(axis=(1, 2))
  return added / jnp.maximum(added.sum(), jnp.finfo(jnp.float32).tiny)


class Niches(flax.struct.PyTreeNode):
  """What the search goes on from: a population with N places.

  Attributes:
    genotypes: leaves `[N, ...]`; zeros where a place is empty.
    values: float32 `[N, K, B]` as in `Scored`; NaN where a place is empty.
    scores: float32 `[N, K]`; NaN where a place is empty.
    identities: int32 `[N]`; `NOBODY` where a place is empty.
    asked: int32, how many individuals were told so far, the initial population included.
  """

  genotypes: Genotype
  values: ArrayField
  scores: ArrayField
  identities: ArrayField
  asked: ArrayField


class NaturalNiches:
  """The search of `m2n2`, whose arguments these are, with crossover and mutation chosen.

  Raises:
    ValueError: naming the argument that is out of range.
  """

  def __init__(
    self,
    *,
    space: Space,
    batch_size: int,
    population_size: int,
    alpha: float,
    attracted: bool,
    crossover: Crossover,
    mutation: Mutation | None,
    variation: str = "",
  ):
    if batch_size < 1:
      raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if population_size < 2:
      raise ValueError(f"population_size: expected at least 2, got {population_size}")
    check_setting("alpha", alpha, low=0.0)
    self.space = space
    self.batch_size = batch_size
    self.variation = variation
    self._size = population_size
    self._alpha = alpha
    self._attracted = attracted
    self._crossover = crossover
    self._mutation = mutation

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> Niches:
    """See `Algorithm`. The initial population enters one by one, as children do.

    Raises:
      ValueError: if no individual got finite scores on all tasks.
    """
    del key
    scored = scored.with_scores()
    if not np.isfinite(np.asarray(scored.scores)).all(axis=-1).any():
      raise ValueError("scores: expected an individual with finite scores on all tasks, got none")
    _, num_tasks, num_samples = scored.values.shape
    empty = Niches(
      genotypes=jax.tree.map(lambda leaf: jnp.zeros((self._size, *leaf.shape[1:]), leaf.dtype), initial),
      values=jnp.full((self._size, num_tasks, num_samples), jnp.nan, jnp.float32),
      scores=jnp.full((self._size, num_tasks), jnp.nan, jnp.float32),
      identities=jnp.full(self._size, NOBODY, jnp.int32),
      asked=jnp.int32(0),
    )
    state: Niches = jax.jit(self._insert_all)(empty, initial, scored.values, scored.scores)
    return state

  def ask(self, state: Niches, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`; the parents are named, and the crossover's note is kept."""
    pair_key, crossover_key, mutation_key = jax.random.split(key, 3)
    pairs = jax.vmap(self._draw_pair, in_axes=(None, 0))(state, jax.random.split(pair_key, self.batch_size))
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[pairs[:, i]], state.genotypes) for i in (0, 1))
    children = jax.vmap(self._crossover)(jax.random.split(crossover_key, self.batch_size), first, second)
    genotypes, note = children if isinstance(children, Child) else (children, {})
    if self._mutation is not None:
      genotypes = jax.vmap(self._mutation)(jax.random.split(mutation_key, self.batch_size), genotypes)
    return genotypes, Info(parents=state.identities[pairs], note=note)

  def tell(self, state: Niches, genotypes: Genotype, scored: Scored, info: Info) -> tuple[Niches, Metrics]:
    """See `Algorithm`; the one figure is the best mean in the population."""
    del info
    scored = scored.with_scores()
    state = self._insert_all(state, genotypes, scored.values, scored.scores)
    means = state.scores.mean(axis=-1)
    return state, {"best_mean": jnp.where(jnp.isfinite(means), means, -jnp.inf).max()}

  def population(self, state: Niches) -> Population:
    """The members, in the order of their places."""
    members = np.flatnonzero(np.asarray(state.identities) != NOBODY)
    return Population(
      genotypes=jax.tree.map(lambda leaf: leaf[members], state.genotypes),
      values=np.asarray(state.values)[members],
      identities=np.asarray(state.identities)[members],
      scores=np.asarray(state.scores)[members],
    )

  def _draw_pair(self, state: Niches, key: PRNGKey) -> Int[Array, "2"]:
    """The places of two parents. Where nothing tells members apart they are drawn alike, or by fitness only."""
    first_key, second_key = jax.random.split(key)
    fitness = competition(state.values, alpha=self._alpha)
    fitness = jnp.where(fitness.sum() > 0, fitness, (state.identities != NOBODY).astype(jnp.float32))
    first = jax.random.categorical(first_key, jnp.log(fitness))
    weights = fitness
    if self._attracted:
      added = attraction(state.values, first, alpha=self._alpha)
      weights = jnp.where(added.sum() > 0, added, fitness)
    return jnp.stack([first, jax.random.categorical(second_key, jnp.log(weights))])

  def _insert_all(self, state: Niches, genotypes: Genotype, values: Any, scores: Any) -> Niches:
    """Offers individuals one by one, so that each competes with those before it."""
    identities = state.asked + jnp.arange(population_size(genotypes), dtype=jnp.int32)

    def insert(state: Niches, offered: Any) -> tuple[Niches, None]:
      return self._insert(state, *offered), None

    offered = (genotypes, jnp.asarray(values, jnp.float32), jnp.asarray(scores, jnp.float32), identities)
    return jax.lax.scan(insert, state, offered)[0]

  def _insert(self, state: Niches, genotype: Genotype, values: Any, scores: Any, identity: Any) -> Niches:
    """Who is worst of the members and the one that is offered, leaves `[...]`, goes; the first of equals.

    An empty place is worse than any member, and what failed never enters.
    """
    fitness = competition(jnp.concatenate([state.values, values[None]]), alpha=self._alpha)
    members = jnp.where(state.identities == NOBODY, -1, fitness[:-1])
    place = jnp.argmin(members)
    enters = jnp.isfinite(scores).all() & (members[place] <= fitness[-1])

    def put(leaf: jax.Array, own: jax.Array) -> jax.Array:
      return leaf.at[place].set(jnp.where(enters, own, leaf[place]))

    return Niches(
      genotypes=jax.tree.map(put, state.genotypes, genotype),
      values=put(state.values, values),
      scores=put(state.scores, scores),
      identities=put(state.identities, identity),
      asked=state.asked + 1,
    )


def m2n2(
  context: SearchContext,
  *,
  batch_size: int = 1,
  population_size: int = 20,
  alpha: float = 1.0,
  attracted: bool = True,
  genotype: MakeSpace = dense,
  crossover: Crossover | None = None,
  mutation: Mutation | None = None,
) -> Algorithm:
  """M2N2 (Abrantes et al. 2025, arXiv:2508.16204): members compete for samples, and merge with who adds most.

  The first parent is drawn by `competition`, the second by `attraction`. The child enters if it is no worse than the
  worst member, whose place it takes; the fitness is that of all of them together. Children of one batch have parents
  from the population before it, and enter in turn. With alpha 0 and not attracted it is a plain genetic algorithm.

  Args:
    context: of the run.
    batch_size: children per iteration; the authors have 1.
    population_size: members that are kept, at least 2.
    alpha: how much of a sample's worth members share, from 0 (nothing) to 1 (all).
    attracted: whether the second parent is who adds most to the first; else it is drawn as the first.
    genotype: what an individual is stored as: dense, core, coefficients.
    crossover: how two parents become a child. Not given: split_slerp (the paper), or slerp where individuals are cores,
      or line where they are coefficients.
    mutation: what happens to a child then. Not given: nothing, as the authors merge models that were trained; from
      random networks they evolve with {use: gaussian, std: 0.01}.

  Raises:
    ValueError: naming the setting: out of range, or an operator that is not valid in the space of the genotypes.
  """
  space = genotype(context.root, context.keep)
  crossover = USUAL_CROSSOVERS[space.frame] if crossover is None else crossover
  mutation = no_mutation if mutation is None else mutation
  check_frame(crossover, space.name, space.frame, "crossover")
  check_frame(mutation, space.name, space.frame, "mutation")
  if unbound(mutation) is expert_svd_mutation:
    raise ValueError("mutation: expert_svd adds part of the expert of the active task, and m2n2 has no active task")
  return NaturalNiches(
    space=space,
    batch_size=batch_size,
    population_size=population_size,
    alpha=alpha,
    attracted=attracted,
    crossover=crossover,
    mutation=None if mutation is no_mutation else mutation,
    variation=in_words(crossover, mutation),
  )


def _shares(values: Array, alpha: ArrayLike) -> Array:
  """What each of N members gets of each sample, `[N, K, B]`."""
  rewards = jnp.where(jnp.isfinite(values), jnp.maximum(values, 0), 0).astype(jnp.float32)
  total = rewards.sum(axis=0, keepdims=True)
  return rewards / jnp.where(total > 0, total, 1) ** alpha
