"""GENOME: a population of models under crossover, mutation, succession and selection (Zhang et al. 2025)."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cqd_jax.archive.selectors import select_pairs
from cqd_jax.genotypes.space import Space, population_size, take
from cqd_jax.search.algorithm import Info, Population
from cqd_jax.search.members import NOBODY, Members, chosen, first_members, joined, members_of, where
from cqd_jax.tasks.problem import Scored
from cqd_jax.trees import leaf_keys, widen
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey


@dataclasses.dataclass(frozen=True)
class Rates:
  """How a child is made.

  Attributes:
    crossover: the probability that it is a merge of two parents, and not a copy of the first.
    mutation: the probability that it is mutated.
    genes: the share of its weights to which a mutation adds noise.
    sigma: standard deviation of that noise, in units of the root mean square of the leaf.
    step: length of the first step of succession.
    decay: what that length is multiplied by after each iteration.
    own: pull to the fitter parent, in succession; of the three pulls only the proportions matter.
    best: pull to the best individual so far.
    worst: push away from the worst individual so far.
  """

  crossover: float
  mutation: float
  genes: float
  sigma: float
  step: float
  decay: float
  own: float
  best: float
  worst: float

  def __post_init__(self) -> None:
    for name in ("crossover", "mutation", "genes", "decay"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
    for name in ("sigma", "step", "own", "best", "worst"):
      if not getattr(self, name) >= 0.0:
        raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")


class SuccessionState(flax.struct.PyTreeNode):
  """N individuals, and what is remembered beside them.

  Attributes:
    members: the population; the best individual so far is always one of them.
    worst: leaves `[...]`, the worst individual so far.
    worst_fitness: float32, of it.
    step: float32, the length of the next step of succession.
    asked: int32, the identity of the next child.
  """

  members: Members
  worst: Genotype
  worst_fitness: ArrayField
  step: ArrayField
  asked: ArrayField


class Succession:
  """Evolves a population of N models; it offers them.

  A child has two parents, drawn by roulette: with a probability proportional to their fitness, the mean of the task
  scores. Crossover is their mean weighted by fitness; mutation adds noise to a random part of the weights; succession
  hands on what was learned: a step along the mean of three vectors (to the fitter parent, to the best individual so
  far, away from the worst), each weighted with its strength times its own random number from [0, 1). Of the population
  and its children N survive: the best tenth of all, and others drawn by roulette without replacement.

  Where some fitness is negative, roulette and crossover take the excess over the least. Who failed has no part in
  anything, and from a batch that failed whole nothing is learned.

  Args:
    space: of the genotypes, sums of individuals being all that is needed.
    batch_size: children per iteration.
    size: N, at least as many as experts.
    rates: see `Rates`.

  Raises:
    ValueError: naming the setting that is out of range.

  Reference: Zhang et al. 2025, arXiv:2503.01155, and the program of its authors. Deviations: the four operations make
  one child, where the program moves all N in place and then adds children, scoring both, so that a member that moves
  away from where it was good is lost there; the pull to the fitter parent takes the places of inertia and of the
  member's own best; the merge is linear, where the program has TIES by default; noise is in
  units of what it is added to, where the program has 0.05 on the weights of adapters; no ensemble.
  """

  variation = "mutation, succession"

  def __init__(self, *, space: Space, batch_size: int, size: int, rates: Rates):
    if batch_size < 1:
      raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if size < space.num_experts:
      raise ValueError(f"population_size: expected a place for each of {space.num_experts} experts, got {size}")
    self.batch_size = batch_size
    self.space = dataclasses.replace(space, initial=space.experts, others=())
    self._size = size
    self._rates = rates

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> SuccessionState:
    """See `Algorithm`.

    Raises:
      ValueError: if no expert got finite scores on all tasks.
    """
    del key
    members = first_members(initial, scored, self._size)
    fitnesses = jnp.where(members.identities == NOBODY, jnp.inf, members.fitnesses)
    return SuccessionState(
      members=members,
      worst=take(members.genotypes, jnp.argmin(fitnesses)),
      worst_fitness=fitnesses.min(),
      step=jnp.float32(self._rates.step),
      asked=jnp.int32(population_size(initial)),
    )

  def ask(self, state: SuccessionState, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`."""
    pair_key, child_key, selection_key = jax.random.split(key, 3)
    members = state.members
    weights = roulette_weights(members.fitnesses)
    pairs = select_pairs(pair_key, weights / weights.sum(), self.batch_size)
    best = take(members.genotypes, jnp.argmax(members.fitnesses))
    fitter = jnp.where(members.fitnesses[pairs[:, 1]] > members.fitnesses[pairs[:, 0]], pairs[:, 1], pairs[:, 0])

    def child(key: PRNGKey, pair: Int[Array, "2"], fitter: Int[Array, ""]) -> Genotype:
      cross_key, mutation_key, step_key = jax.random.split(key, 3)
      first, second, own = (take(members.genotypes, place) for place in (pair[0], pair[1], fitter))
      made = self._cross(cross_key, first, second, weights[pair])
      made = self._mutate(mutation_key, made)
      return self._succeed(step_key, made, own, best, state)

    children = jax.vmap(child)(jax.random.split(child_key, self.batch_size), pairs, fitter)
    return children, Info(parents=members.identities[pairs], extra={"key": selection_key})

  def tell(
    self, state: SuccessionState, genotypes: Genotype, scored: Scored, info: Info
  ) -> tuple[SuccessionState, Metrics]:
    """See `Algorithm`; the figures are the best mean so far and the length of the next step."""
    batch = members_of(genotypes, scored, state.asked)
    everyone = joined(state.members, batch)
    counted = jnp.where(batch.identities == NOBODY, jnp.inf, batch.fitnesses)
    worse = counted.min() < state.worst_fitness
    learned = state.replace(
      members=chosen(everyone, survivors(info.extra["key"], everyone.fitnesses, self._size)),
      worst=where(worse, take(genotypes, jnp.argmin(counted)), state.worst),
      worst_fitness=jnp.minimum(counted.min(), state.worst_fitness),
      step=state.step * self._rates.decay,
    )
    succeeded = (batch.identities != NOBODY).any()
    state = where(succeeded, learned, state).replace(asked=state.asked + self.batch_size)
    return state, {"best_mean": state.members.fitnesses.max(), "step": state.step}

  def population(self, state: SuccessionState) -> Population:
    """The population as it is."""
    return state.members.population()

  def _cross(self, key: PRNGKey, first: Genotype, second: Genotype, weights: Float[Array, "2"]) -> Genotype:
    """The parents' mean weighted by fitness, halves where both weights are 0; or the first, uncrossed."""
    total = weights.sum()
    share = jnp.where(total > 0, weights[0] / jnp.where(total > 0, total, 1.0), 0.5)
    share = jnp.where(jax.random.bernoulli(key, self._rates.crossover), share, 1.0)
    return jax.tree.map(lambda one, other: share * widen(one) + (1 - share) * widen(other), first, second)

  def _mutate(self, key: PRNGKey, individual: Genotype) -> Genotype:
    """The individual, or with noise on a random part of its weights."""
    coin_key, key = jax.random.split(key)
    rate = jnp.where(jax.random.bernoulli(coin_key, self._rates.mutation), self._rates.genes, 0.0)

    def add(leaf: Array, subkey: PRNGKey) -> Array:
      mask_key, noise_key = jax.random.split(subkey)
      size = self._rates.sigma * jnp.sqrt(jnp.square(leaf).mean())
      noise = size * jax.random.normal(noise_key, leaf.shape, leaf.dtype)
      return jnp.where(jax.random.bernoulli(mask_key, rate, leaf.shape), leaf + noise, leaf)

    return jax.tree.map(add, individual, leaf_keys(key, individual))

  def _succeed(self, key: PRNGKey, child: Genotype, own: Genotype, best: Genotype, state: SuccessionState) -> Genotype:
    """A step from where the child is, in the dtypes of its parents."""
    drawn = jax.random.uniform(key, (3,)) * jnp.array([self._rates.own, self._rates.best, self._rates.worst])
    shares = state.step * drawn / jnp.maximum(drawn.sum(), jnp.finfo(jnp.float32).tiny)

    def step(child: Array, own: Array, best: Array, worst: Array) -> Array:
      toward = shares[0] * (widen(own) - child) + shares[1] * (widen(best) - child)
      return (child + toward + shares[2] * (child - widen(worst))).astype(own.dtype)

    return jax.tree.map(step, child, own, best, state.worst)


def roulette_weights(fitnesses: Float[Array, "N"]) -> Float[Array, "N"]:
  """What a roulette gives each: its fitness, or the excess over the least where that is negative; 0 for -inf.

  Where all that are there would get 0, all of them get 1.
  """
  there = fitnesses > -jnp.inf
  least = jnp.where(there, fitnesses, jnp.inf).min()
  weights = jnp.where(there, fitnesses - jnp.minimum(least, 0.0), 0.0)
  return jnp.where(weights.sum() > 0, weights, there.astype(weights.dtype))


def survivors(key: PRNGKey, fitnesses: Float[Array, "N"], size: int, *, elite_share: float = 0.1) -> Int[Array, "M"]:
  """Who of N stays: the best `elite_share` of them, one at least, and others by roulette without replacement.

  Whoever the roulette gives nothing comes last, and after all others whose fitness is -inf.
  """
  num_elites = min(size, max(1, round(elite_share * fitnesses.shape[0])))
  order = jnp.argsort(-fitnesses)
  is_elite = jnp.zeros(fitnesses.shape, bool).at[order[:num_elites]].set(True)
  weights = roulette_weights(fitnesses)
  # The largest of logarithms of weights plus Gumbel noise are draws without replacement.
  chances = jnp.log(jnp.maximum(weights, jnp.finfo(jnp.float32).tiny)) + jax.random.gumbel(key, fitnesses.shape)
  chances = jnp.where(fitnesses > -jnp.inf, jnp.where(is_elite, jnp.inf, chances), -jnp.inf)
  return jnp.argsort(-chances)[:size]
