"""Figures of a repertoire, one for each of its K archives."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cqd_jax.archive.repertoire import EMPTY, CyclingRepertoire
from cqd_jax.types import Metrics


def coverage(repertoire: CyclingRepertoire) -> Float[Array, "K"]:
  """The share of cells that hold an elite, in [0, 1]."""
  filled = (repertoire.slots != EMPTY).sum(axis=-1)
  return filled / jnp.asarray(repertoire.cells.num_cells, jnp.float32)


def qd_score(repertoire: CyclingRepertoire, *, offset: float | int = 0.0) -> Float[Array, "K"]:
  """The sum of the elites' fitnesses, each less `offset` (the lowest fitness possible, if it is negative)."""
  fitnesses = repertoire.fitnesses
  return jnp.where(fitnesses == -jnp.inf, 0, fitnesses - offset).sum(axis=-1)


def max_fitness(repertoire: CyclingRepertoire) -> Float[Array, "K"]:
  """The best fitness; -inf for an empty archive."""
  return repertoire.fitnesses.max(axis=-1)


def holders(repertoire: CyclingRepertoire, identities: Int[Array, "P"]) -> Bool[Array, "P K"]:
  """Which archives now hold each of P individuals, by their identities; none for one that is not in the pool."""
  known = repertoire.lineage.identity
  order = jnp.argsort(known)
  place = jnp.minimum(jnp.searchsorted(known[order], identities), known.shape[0] - 1)
  slots = order[place]
  return repertoire.held[slots] & (known[slots] == identities)[:, None]


def cycling_metrics(repertoire: CyclingRepertoire) -> Metrics:
  """`coverage`, `qd_score` and `max_fitness` `[K]`, the best mean score, and the number of distinct elites."""
  means = jnp.where(repertoire.alive, repertoire.scores.mean(axis=-1), -jnp.inf)
  return {
    "coverage": coverage(repertoire),
    "qd_score": qd_score(repertoire),
    "max_fitness": max_fitness(repertoire),
    "best_mean": means.max(),
    "num_elites": repertoire.num_elites,
  }
