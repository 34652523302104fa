"""The CycleQD loop in QDax's style: `init`, then `ask` and `tell`, or `update`, or `scan_update` inside `lax.scan`."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from qdax.core.emitters.emitter import Emitter, EmitterState

from cqd_jax.archive.cells import Cells
from cqd_jax.archive.metrics import cycling_metrics
from cqd_jax.archive.repertoire import CyclingRepertoire
from cqd_jax.types import ExtraScores, Genotype, Metrics, PRNGKey

ScoringFn: TypeAlias = Callable[[Genotype, PRNGKey], tuple[Array | np.ndarray, ExtraScores]]
"""Scores P genotypes: (genotypes, key) -> (scores `[P, K]`, extra scores with leaves `[P, ...]`)."""

State: TypeAlias = EmitterState | None


class CycleQD:
  """Quality-Diversity over K tasks whose roles of fitness and descriptor cycle (arXiv:2410.14735).

  The methods are pure. Where scoring needs the world (texts to execute), compile around it and donate the repertoire:

      ask, tell = jax.jit(cycleqd.ask), jax.jit(cycleqd.tell, donate_argnames=("repertoire", "emitter_state"))
      genotypes, extra_info = ask(repertoire, emitter_state, key)
      scores = ...
      repertoire, emitter_state, metrics = tell(
        genotypes=genotypes, scores=scores, repertoire=repertoire, emitter_state=emitter_state, extra_info=extra_info)

  Where the scoring function can be traced, the whole loop can: `jax.lax.scan(cycleqd.scan_update, carry, length=100)`.

  Args:
    scoring_fn: used by `init` and `update`; None if you only ask and tell.
    emitter: `CycleQDEmitter`, or any QDax emitter: one that needs to know its archive inside `PerArchiveEmitter`.
    metrics_fn: figures of a repertoire, returned after each iteration.
  """

  def __init__(
    self,
    scoring_fn: ScoringFn | None,
    emitter: Emitter,
    metrics_fn: Callable[[CyclingRepertoire], Metrics] = cycling_metrics,
  ):
    self._scoring_fn = scoring_fn
    self._emitter = emitter
    self._metrics_fn = metrics_fn

  def init(
    self, genotypes: Genotype, cells: Cells, key: PRNGKey, *, capacity: int | None = None
  ) -> tuple[CyclingRepertoire, State, Metrics]:
    """Scores the initial population, as a rule the experts, and files it in all K archives.

    Raises:
      ValueError: without a scoring function; or if no individual got finite scores, so that no parent exists.
    """
    score_key, init_key = jax.random.split(key)
    scores, extra_scores = self._score(genotypes, score_key)
    return self.init_ask_tell(genotypes, scores, cells, init_key, extra_scores=extra_scores, capacity=capacity)

  def init_ask_tell(
    self,
    genotypes: Genotype,
    scores: Array | np.ndarray,
    cells: Cells,
    key: PRNGKey,
    *,
    extra_scores: ExtraScores | None = None,
    capacity: int | None = None,
  ) -> tuple[CyclingRepertoire, State, Metrics]:
    """`init` for a population whose `[P, K]` scores are known; arguments as in `CyclingRepertoire.init`."""
    repertoire = CyclingRepertoire.init(genotypes, scores, cells, extra_scores=extra_scores, capacity=capacity)
    if not isinstance(repertoire.num_free, jax.core.Tracer) and int(repertoire.num_elites) == 0:
      raise ValueError(
        "scores: no individual of the initial population has finite scores on all tasks, so the archives are empty and "
        f"there is nothing to select parents from; got {np.asarray(scores)}"
      )
    scores = jnp.asarray(scores, jnp.float32)
    emitter_state = self._emitter.init(key, repertoire, genotypes, scores, scores, extra_scores or {})
    return repertoire, emitter_state, self._metrics_fn(repertoire)

  def ask(self, repertoire: CyclingRepertoire, emitter_state: State, key: PRNGKey) -> tuple[Genotype, ExtraScores]:
    """Children to be scored, leaves `[P, ...]`, and what the emitter reports of them (`parents`, `archive`)."""
    genotypes, extra_info = self._emitter.emit(repertoire, emitter_state, key)
    return genotypes, extra_info

  def tell(
    self,
    genotypes: Genotype,
    scores: Array | np.ndarray,
    repertoire: CyclingRepertoire,
    emitter_state: State,
    extra_scores: ExtraScores | None = None,
    extra_info: ExtraScores | None = None,
  ) -> tuple[CyclingRepertoire, State, Metrics]:
    """Offers scored children to all archives and lets the emitter learn from them.

    Args:
      genotypes: leaves `[P, ...]`, from `ask`.
      scores: `[P, K]`; a row with NaN or inf (a child whose evaluation failed) is counted and not kept.
      repertoire: as given to `ask`. While tracing, a capacity-bound pool cannot grow: call `repertoire.reserve(P)`
        before, as long as it may.
      emitter_state: as given to `ask`.
      extra_scores: leaves `[P, ...]`.
      extra_info: from `ask`. Parents are recorded where it names them for all children; QDax's `MultiEmitter` does
        not say which children are whose.
    """
    scores = jnp.asarray(scores, jnp.float32)
    parents = (extra_info or {}).get("parents")
    if parents is not None and parents.shape[0] != scores.shape[0]:
      parents = None
    repertoire = repertoire.add(genotypes, scores, extra_scores=extra_scores, parents=parents)
    emitter_state = self._emitter.state_update(
      emitter_state, repertoire, genotypes, scores, scores, {**(extra_scores or {}), **(extra_info or {})}
    )
    return repertoire, emitter_state, self._metrics_fn(repertoire)

  def update(
    self, repertoire: CyclingRepertoire, emitter_state: State, key: PRNGKey
  ) -> tuple[CyclingRepertoire, State, Metrics]:
    """One iteration: ask, score, tell."""
    ask_key, score_key = jax.random.split(key)
    genotypes, extra_info = self.ask(repertoire, emitter_state, ask_key)
    scores, extra_scores = self._score(genotypes, score_key)
    return self.tell(genotypes, scores, repertoire, emitter_state, extra_scores, extra_info)

  def scan_update(
    self, carry: tuple[CyclingRepertoire, State, PRNGKey], _: Any = None
  ) -> tuple[tuple[CyclingRepertoire, State, PRNGKey], Metrics]:
    """`update` as the body of a `jax.lax.scan`: the key travels in the carry."""
    repertoire, emitter_state, key = carry
    key, subkey = jax.random.split(key)
    repertoire, emitter_state, metrics = self.update(repertoire, emitter_state, subkey)
    return (repertoire, emitter_state, key), metrics

  def _score(self, genotypes: Genotype, key: PRNGKey) -> tuple[Array | np.ndarray, ExtraScores]:
    if self._scoring_fn is None:
      raise ValueError("scoring_fn: None, so use ask and tell; nothing can be scored here")
    return self._scoring_fn(genotypes, key)
