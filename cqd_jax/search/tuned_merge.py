"""Merges with tuned settings: one merge of the experts, tried with each of a few settings, of which the best counts.

Beside what evolution finds stand the methods that need no search at all; each gets as many trials as it has settings.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cqd_jax.genotypes.space import Space, population_of_one, population_size
from cqd_jax.operators import dare, task_arithmetic, ties
from cqd_jax.operators.frames import check_frame, needs_frame
from cqd_jax.search.algorithm import Info, Population
from cqd_jax.tasks.problem import Scored, task_scores
from cqd_jax.trees import widen
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey

Merge: TypeAlias = Callable[[PRNGKey, Genotype, Array], Genotype]
"""`(key, experts, scale) -> one individual`: experts with leaves `[E, ...]`; the scale is traced."""


class Trial(NamedTuple):
  """A merge with some of its settings bound.

  Attributes:
    settings: which, by name.
    merge: the merge.
  """

  settings: Mapping[str, float]
  merge: Merge


class TrialState(flax.struct.PyTreeNode):
  """What the search over S settings goes on from.

  Attributes:
    key: uint32, the data of the key of all that is random in the merges.
    values: float32 `[S, K, B]`; NaN where none was scored yet.
    scores: float32 `[S, K]`.
    count: int32, how many were tried.
    first: int32, the identity of the first.
  """

  key: ArrayField
  values: ArrayField
  scores: ArrayField
  count: ArrayField
  first: ArrayField


class TunedMerge:
  """Tries each merge with each scale, one after the other; it offers only the best.

  Args:
    trials: the merges; each is tried with all scales before the next.
    scales: what each is multiplied by.
    space: in which the experts are merged.
    variation: what is tried, in words.

  Raises:
    ValueError: if there is no merge or no scale, or a merge is not valid in the space.
  """

  batch_size = 1

  def __init__(self, trials: Sequence[Trial], scales: Sequence[float], *, space: Space, variation: str):
    if not scales:
      raise ValueError("scales: expected at least one")
    if not trials:
      raise ValueError("trials: expected at least one")
    for trial in trials:
      check_frame(trial.merge, space.name, space.frame, "merge")
    self.space = space
    self.variation = variation
    self.budget = len(trials) * len(scales)
    self._merges = [trial.merge for trial in trials]
    pairs = list(itertools.product(trials, scales))
    self._settings = {
      **{name: tuple(trial.settings[name] for trial, _ in pairs) for name in trials[0].settings},
      "scale": tuple(scale for _, scale in pairs),
    }

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> TrialState:
    """See `Algorithm`."""
    _, num_tasks, num_samples = scored.values.shape
    return TrialState(
      key=jax.random.key_data(key),
      values=jnp.full((self.budget, num_tasks, num_samples), jnp.nan, jnp.float32),
      scores=jnp.full((self.budget, num_tasks), jnp.nan, jnp.float32),
      count=jnp.int32(0),
      first=jnp.int32(population_size(initial)),
    )

  def ask(self, state: TrialState, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`. What is random follows from the state's key, so that the best can be made again."""
    del key
    note = {name: jnp.asarray(values, jnp.float32)[state.count][None] for name, values in self._settings.items()}
    return self._merged(state.key, state.count), Info(note=note)

  def tell(self, state: TrialState, genotypes: Genotype, scored: Scored, info: Info) -> tuple[TrialState, Metrics]:
    """See `Algorithm`."""
    del genotypes, info
    scored = scored.with_scores()
    scores = state.scores.at[state.count].set(scored.scores[0].astype(jnp.float32))
    means = scores.mean(axis=-1)
    state = state.replace(
      values=state.values.at[state.count].set(scored.values[0]), scores=scores, count=state.count + 1
    )
    return state, {"best_mean": jnp.where(jnp.isfinite(means), means, -jnp.inf).max()}

  def population(self, state: TrialState) -> Population:
    """The best of the merges, the first of equals."""
    means = task_scores(np.asarray(state.values)[: int(state.count)]).mean(axis=-1)
    best = int(np.where(np.isnan(means), -np.inf, means).argmax())
    return Population(
      genotypes=jax.jit(self._merged)(state.key, jnp.int32(best)),  # as it was asked, to the bit
      values=np.asarray(state.values)[best : best + 1],
      identities=int(state.first) + np.array([best]),
      scores=np.asarray(state.scores)[best : best + 1],
      chosen={name: values[best] for name, values in self._settings.items()},
    )

  def _merged(self, key: Array, count: Array) -> Genotype:
    """The individual of a trial, leaves `[1, ...]`. Trials that differ in the scale only have equal random numbers."""
    num_scales = self.budget // len(self._merges)
    scale = jnp.asarray(self._settings["scale"], jnp.float32)[count]
    index = count // num_scales
    args = (jax.random.fold_in(jax.random.wrap_key_data(key), index), self.space.experts, scale)
    if len(self._merges) == 1:
      return population_of_one(self._merges[0](*args))
    return population_of_one(jax.lax.switch(index, self._merges, *args))


@needs_frame("linear")
def scaled_sum(key: PRNGKey, experts: Genotype, scale: Array) -> Genotype:
  """The sum of the experts, leaves `[E, ...]`, times `scale` (Ilharco et al. 2023, arXiv:2212.04089)."""
  del key
  return task_arithmetic(experts, scale)


@needs_frame("elementwise")
def scaled_ties(key: PRNGKey, experts: Genotype, scale: Array, *, density: float) -> Genotype:
  """`ties` of the experts, leaves `[E, ...]`, times `scale`, the paper's lambda; rounded to their dtypes once."""
  del key
  merged = ties(jax.tree.map(widen, experts), density=density)
  return jax.tree.map(lambda leaf, like: (scale * leaf).astype(like.dtype), merged, experts)


@needs_frame("elementwise")
def scaled_dare(key: PRNGKey, experts: Genotype, scale: Array, *, drop_rate: float) -> Genotype:
  """The sum of the experts after `dare` of each, leaves `[E, ...]`, times `scale`; rounded to their dtypes once."""
  keys = jax.random.split(key, population_size(experts))
  sparse = jax.vmap(functools.partial(dare, drop_rate=drop_rate))(keys, jax.tree.map(widen, experts))
  return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), task_arithmetic(sparse, scale), experts)
