"""Model Swarms: particle swarm optimization whose particles are models (Feng et al. 2024, arXiv:2410.11163)."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cqd_jax.archive.selectors import select_pairs
from cqd_jax.genotypes.space import Space, take
from cqd_jax.search.algorithm import Info, Population
from cqd_jax.search.members import NOBODY, Members, first_members, members_of, where
from cqd_jax.tasks.problem import Scored
from cqd_jax.trees import widen
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey


@dataclasses.dataclass(frozen=True)
class Pull:
  """How strongly a particle is drawn; only the proportions matter.

  Attributes:
    inertia: by where it was going.
    own: to the best position that it has had itself.
    best: to the best position that any has had.
    worst: away from the worst position that any has had.
  """

  inertia: float = 0.4
  own: float = 0.3
  best: float = 0.3
  worst: float = 0.3

  def __post_init__(self) -> None:
    strengths = dataclasses.astuple(self)
    if min(strengths) < 0 or not max(strengths) > 0:
      names = ", ".join(field.name for field in dataclasses.fields(self))
      raise ValueError(f"{names}: expected numbers of at least 0, one of them above 0, got {strengths}")


class SwarmState(flax.struct.PyTreeNode):
  """Where N particles are and have been: three genotypes of each, and one.

  Attributes:
    positions: leaves `[N, ...]`.
    velocities: leaves `[N, ...]`.
    bests: the best position that each has had; an empty place is that of a particle which has had no score yet.
    stale: int32 `[N]`, iterations since each found its best position.
    worst: leaves `[...]`, the worst position that any has had.
    worst_fitness: float32, of it.
    step: float32, the length of the next step in units of the velocity.
    asked: int32, the identity of the next child.
  """

  positions: Genotype
  velocities: Genotype
  bests: Members
  stale: ArrayField
  worst: Genotype
  worst_fitness: ArrayField
  step: ArrayField
  asked: ArrayField


class ParticleSwarm:
  """Moves N particles in the space of weights, all of them in every iteration; it offers their best positions.

  The experts are the first particles. The others are placed in the first batch: each on the line between two experts,
  at a uniformly random point. Every particle begins in the direction of another one. From then on its velocity becomes
  the mean of four vectors, those of `Pull`, each weighted with its strength times its own random number from [0, 1),
  and the particle takes a step along it. A particle without a better position for a while restarts from its best one,
  without velocity, and does so in every iteration until it finds a better one.

  A particle whose evaluation failed stays where it was; one that has no score yet is placed again, between two that
  have. From a batch that failed whole nothing is learned.

  Args:
    space: in which models move, sums of individuals being all that is needed.
    num_particles: N, at least as many as experts.
    pull: the strengths.
    step: length of the first step in units of the velocity.
    decay: what the length is multiplied by after each iteration.
    least_step: the length below which it never falls.
    restart_after: iterations without a better position until a restart; 0: never.

  Raises:
    ValueError: naming the setting that is out of range.

  Reference: Feng et al. 2024, arXiv:2410.11163, algorithm 1, and the program of its authors, whose default settings are
  these. Deviation: it ends with the budget, and not when the best position has not changed for so many iterations.
  """

  variation = "a step of the swarm"

  def __init__(
    self,
    *,
    space: Space,
    num_particles: int,
    pull: Pull,
    step: float,
    decay: float,
    least_step: float,
    restart_after: int,
  ):
    if space.num_experts < 2:
      raise ValueError(f"experts: a swarm moves between at least 2, got {space.num_experts}")
    if num_particles < space.num_experts:
      raise ValueError(f"batch_size: expected a particle for each of {space.num_experts} experts, got {num_particles}")
    if not (step > 0 and 0 < decay <= 1 and 0 <= least_step <= step):
      raise ValueError(
        "step, decay, least_step: expected step > 0, decay in (0, 1] and least_step in [0, step], "
        f"got {step}, {decay}, {least_step}"
      )
    if restart_after < 0:
      raise ValueError(f"restart_after: expected at least 0, got {restart_after}")
    self.batch_size = num_particles
    self.space = dataclasses.replace(space, initial=space.experts, others=())
    self._pull = jnp.asarray(dataclasses.astuple(pull), jnp.float32)
    self._step, self._decay, self._least_step = step, decay, least_step
    self._restart_after = restart_after

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> SwarmState:
    """See `Algorithm`.

    Raises:
      ValueError: if no expert got finite scores on all tasks.
    """
    bests = first_members(initial, scored, self.batch_size)
    num_experts = self.space.num_experts
    turn = jax.random.randint(key, (num_experts,), 1, num_experts)
    partners = (jnp.arange(num_experts) + turn) % num_experts
    partners = jnp.concatenate([partners, jnp.arange(num_experts, self.batch_size)])
    fitnesses = jnp.where(bests.identities == NOBODY, jnp.inf, bests.fitnesses)
    return SwarmState(
      positions=jax.tree.map(jnp.copy, bests.genotypes),
      velocities=_differences(take(bests.genotypes, partners), bests.genotypes),
      bests=bests,
      stale=jnp.zeros(self.batch_size, jnp.int32),
      worst=take(bests.genotypes, jnp.argmin(fitnesses)),
      worst_fitness=fitnesses.min(),
      step=jnp.float32(self._step),
      asked=jnp.int32(num_experts),
    )

  def ask(self, state: SwarmState, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`. Parents of a particle are its own best and the best of all, or the two between which it is."""
    place_key, move_key = jax.random.split(key)
    placed = state.bests.identities != NOBODY
    ours, our_velocities, best = self._moved(state, move_key)
    theirs, their_velocities, pairs = self._placed(state, place_key)
    own = jnp.stack([jnp.arange(self.batch_size), jnp.full(self.batch_size, best)], axis=1)
    parents = state.bests.identities[where(placed, own, pairs)]
    velocities = where(placed, our_velocities, their_velocities)
    return where(placed, ours, theirs), Info(parents=parents, extra={"velocities": velocities})

  def tell(self, state: SwarmState, genotypes: Genotype, scored: Scored, info: Info) -> tuple[SwarmState, Metrics]:
    """See `Algorithm`; the figures are the best mean so far and the length of the next step."""
    batch = members_of(genotypes, scored, state.asked)
    fitnesses = batch.fitnesses
    succeeded, better = batch.identities != NOBODY, fitnesses > state.bests.fitnesses
    counted = jnp.where(succeeded, fitnesses, jnp.inf)
    worse = counted.min() < state.worst_fitness
    learned = state.replace(
      positions=where(succeeded, genotypes, state.positions),
      velocities=where(succeeded, info.extra["velocities"], state.velocities),
      bests=where(better, batch, state.bests),
      stale=jnp.where(better, 0, state.stale + 1),
      worst=where(worse, take(genotypes, jnp.argmin(counted)), state.worst),
      worst_fitness=jnp.minimum(counted.min(), state.worst_fitness),
      step=jnp.maximum(state.step * self._decay, self._least_step),
    )
    state = where(succeeded.any(), learned, state).replace(asked=state.asked + self.batch_size)
    return state, {"best_mean": state.bests.fitnesses.max(), "step": state.step}

  def population(self, state: SwarmState) -> Population:
    """The best position that each particle has had."""
    return state.bests.population()

  def _moved(self, state: SwarmState, key: PRNGKey) -> tuple[Genotype, Genotype, Array]:
    """Positions and velocities after a step, leaves `[N, ...]`, and whose best position is the best of all."""
    shares = swarm_shares(key, self._pull, self.batch_size)
    best = jnp.argmax(state.bests.fitnesses)
    restarts = (state.stale >= self._restart_after) & (self._restart_after > 0)

    def move(position: Array, velocity: Array, own: Array, worst: Array) -> tuple[Array, Array]:
      weights = shares.reshape(*shares.shape, *(1,) * (position.ndim - 1))
      here = where(restarts, widen(own), widen(position))
      going = where(restarts, jnp.zeros_like(here), widen(velocity))
      own, far = widen(own), widen(worst)[None]
      going = weights[0] * going + weights[1] * (own - here) + weights[2] * (own[best][None] - here)
      going = going + weights[3] * (here - far)
      return (here + state.step * going).astype(position.dtype), going.astype(position.dtype)

    moved = jax.tree.map(move, state.positions, state.velocities, state.bests.genotypes, state.worst)
    positions, velocities = jax.tree.transpose(jax.tree.structure(state.positions), jax.tree.structure((0, 0)), moved)
    return positions, velocities, best

  def _placed(self, state: SwarmState, key: PRNGKey) -> tuple[Genotype, Genotype, Array]:
    """Positions between two best ones, the velocities from there to a third, leaves `[N, ...]`, and which two."""
    pair_key, point_key, aim_key = jax.random.split(key, 3)
    placed = (state.bests.identities != NOBODY).astype(jnp.float32)
    pairs = select_pairs(pair_key, placed, self.batch_size)
    aims = select_pairs(aim_key, placed, self.batch_size)[:, 0]
    points = jax.random.uniform(point_key, (self.batch_size,))
    bests = state.bests.genotypes

    def between(one: Array, other: Array) -> Array:
      share = points.reshape(-1, *(1,) * (one.ndim - 1))
      return (share * widen(one) + (1 - share) * widen(other)).astype(one.dtype)

    positions = jax.tree.map(between, take(bests, pairs[:, 0]), take(bests, pairs[:, 1]))
    return positions, _differences(take(bests, aims), positions), pairs


def swarm_shares(key: PRNGKey, strengths: Float[Array, "4"], num_particles: int) -> Float[Array, "4 N"]:
  """How much each of the four pulls counts for each particle: strength times a number from [0, 1), made to sum to 1."""
  drawn = strengths[:, None] * jax.random.uniform(key, (strengths.shape[0], num_particles))
  return drawn / jnp.maximum(drawn.sum(axis=0, keepdims=True), jnp.finfo(jnp.float32).tiny)


def _differences(one: Genotype, other: Genotype) -> Genotype:
  """One minus the other, in their dtypes."""
  return jax.tree.map(lambda ours, theirs: (widen(ours) - widen(theirs)).astype(ours.dtype), one, other)
