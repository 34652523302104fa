"""A bounded set of scored individuals: what a search over weights keeps, however many children it has seen."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cqd_jax.genotypes.space import population_size, take
from cqd_jax.search.algorithm import Population
from cqd_jax.tasks.problem import Scored
from cqd_jax.types import ArrayField, Genotype

NOBODY = -1


class Members(flax.struct.PyTreeNode):
  """N places, each with an individual or empty.

  Attributes:
    genotypes: leaves `[N, ...]`; 0 where a place is empty.
    values: float32 `[N, K, B]`, as in `Scored`; NaN where a place is empty.
    scores: float32 `[N, K]`; NaN where a place is empty.
    identities: int32 `[N]`, in the order in which individuals were scored; -1 where a place is empty.
  """

  genotypes: Genotype
  values: ArrayField
  scores: ArrayField
  identities: ArrayField

  @property
  def size(self) -> int:
    """N."""
    return int(self.identities.shape[0])

  @property
  def fitnesses(self) -> Float[Array, "N"]:
    """The mean of the task scores; -inf where a score is not finite or a place is empty."""
    return fitnesses_of(self.scores)

  def population(self) -> Population:
    """Who is there, in the order of the places; on the host."""
    there = np.flatnonzero(np.asarray(self.identities) != NOBODY)
    return Population(
      genotypes=take(self.genotypes, there),
      values=np.asarray(self.values)[there],
      identities=np.asarray(self.identities)[there],
      scores=np.asarray(self.scores)[there],
    )


def fitnesses_of(scores: Float[Array, "N K"]) -> Float[Array, "N"]:
  """The mean of the K task scores; -inf where one of them is not finite, so that it ranks last."""
  means = scores.mean(axis=-1)
  return jnp.where(jnp.isfinite(means), means, -jnp.inf)


def members_of(genotypes: Genotype, scored: Scored, first: Any = 0) -> Members:
  """P individuals that were just scored, numbered from `first`; one with a score that is not finite is an empty place.

  What it weighs is 0 there, since a model may have failed for its NaN.
  """
  scored = scored.with_scores()
  scores = jnp.asarray(scored.scores, jnp.float32)
  failed = ~jnp.isfinite(scores).all(axis=-1)
  identities = jnp.asarray(first, jnp.int32) + jnp.arange(scores.shape[0], dtype=jnp.int32)
  return Members(
    # A copy: the state is donated, and the caller's own must live on.
    genotypes=where(failed, jax.tree.map(jnp.zeros_like, genotypes), genotypes),
    values=jnp.where(failed[:, None, None], jnp.nan, jnp.asarray(scored.values, jnp.float32)),
    scores=jnp.where(failed[:, None], jnp.nan, scores),
    identities=jnp.where(failed, NOBODY, identities),
  )


def first_members(genotypes: Genotype, scored: Scored, size: int) -> Members:
  """The initial population in the first of `size` places; the others are empty.

  Raises:
    ValueError: if nobody has finite scores, so that no parent exists, or there are fewer places than individuals.
  """
  members = members_of(genotypes, scored)
  if not (np.asarray(members.identities) != NOBODY).any():
    raise ValueError(
      "scores: no individual of the initial population has finite scores on all tasks, so there is nothing to begin "
      f"with; got {np.asarray(scored.with_scores().scores)}"
    )
  missing = size - population_size(genotypes)
  if missing < 0:
    raise ValueError(f"size: expected a place for each of {population_size(genotypes)} initial individuals, got {size}")
  return jax.tree.map(lambda leaf, empty: jnp.concatenate([leaf, empty]), members, _empty(members, missing))


def joined(one: Members, other: Members) -> Members:
  """Both, one after the other."""
  both: Members = jax.tree.map(lambda first, second: jnp.concatenate([first, second]), one, other)
  return both


def chosen(members: Members, places: Int[Array, "M"]) -> Members:
  """The members at M places, in that order."""
  found: Members = jax.tree.map(lambda leaf: leaf[places], members)
  return found


def where(mask: Bool[Array, "*P"], one: Any, other: Any) -> Any:
  """For each individual that of `one` or of `other`, leaves `[*P, ...]`."""

  def pick(ours: Array, theirs: Array) -> Array:
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (ours.ndim - mask.ndim)), ours, theirs)

  return jax.tree.map(pick, one, other)


def _empty(like: Members, size: int) -> Members:
  """As many empty places."""

  def filled(leaf: Array, value: Any) -> Array:
    return jnp.full((size, *leaf.shape[1:]), value, leaf.dtype)

  return Members(
    genotypes=jax.tree.map(lambda leaf: filled(leaf, 0), like.genotypes),
    values=filled(like.values, jnp.nan),
    scores=filled(like.scores, jnp.nan),
    identities=filled(like.identities, NOBODY),
  )
