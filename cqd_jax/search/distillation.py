"""The swarm that becomes one model: gradient steps from a merge, on answers that were executed and passed.

Every answer that passed is a label that cost nothing but the evaluation. Those of the experts and of the swarm's most
complementary members, to questions of the training split, are learned by one model; validation says when to stop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes.space import MakeSpace, Space, dense, population_of_one, population_size
from cqd_jax.operators import task_arithmetic
from cqd_jax.search.algorithm import Algorithm, Info, Population, SearchContext, Teachers
from cqd_jax.search.gradient import Descent, begin_descent, cosine, descend
from cqd_jax.tasks.problem import Scored, TrainingSignal
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey

LABELS = ("experts", "swarm", "references")
STARTS = ("task_arithmetic", "base", "best", "average")
AVERAGED = 5
"""Members of the swarm that the start "average" is of."""

WARM_UP = 10


class Distilled(flax.struct.PyTreeNode):
  """What distilling goes on from.

  Attributes:
    descent: where it has come to.
    best: leaves `[...]`, of all that was scored the one with the best mean on validation.
    values: float32 `[K, B]` of `best`.
    scores: float32 `[K]` of `best`; -inf before anything was scored.
    count: int32, how many were scored.
    best_count: int32, as which of them `best` was scored.
    first: int32, the identity of the first.
  """

  descent: Descent
  best: Genotype
  values: ArrayField
  scores: ArrayField
  count: ArrayField
  best_count: ArrayField
  first: ArrayField


def distill(
  context: SearchContext,
  *,
  genotype: MakeSpace = dense,
  labels: str = "swarm",
  members: int = 8,
  start: str = "task_arithmetic",
  scales: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
  steps: int = 300,
  validate_every: int = 25,
  learning_rate: float = 5e-4,
) -> Algorithm:
  """Gradient steps from a merge, on verified answers to training questions; validation says which steps were enough.

  Args:
    context: of the run.
    genotype: what is moved: dense (whole weights), core, coefficients.
    labels: whose answers are learned: experts; swarm (theirs and those of some members of the first method's
      population); references (the answers that came with the questions, which a reward alone does not give).
    members: of the swarm, chosen to complement one another on validation.
    start: task_arithmetic (the best of `scales`), base, best (of the swarm), average (of the swarm's best five).
    scales: of the experts' sum that are tried.
    steps: of Adam.
    validate_every: steps after which the model is scored on validation.
    learning_rate: the largest; warm-up and cosine. Cores and coefficients want larger ones than weights.

  Raises:
    ValueError: naming the setting that cannot be used.
  """
  if labels not in LABELS:
    raise ValueError(f"labels: expected one of {', '.join(LABELS)}, got {labels!r}")
  if start not in STARTS:
    raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
  for name, value in (("steps", steps), ("validate_every", validate_every), ("members", members)):
    if value < 1:
      raise ValueError(f"{name}: expected at least 1, got {value}")
  if not learning_rate > 0:
    raise ValueError(f"learning_rate: expected more than 0, got {learning_rate}")
  if start == "task_arithmetic" and not scales:
    raise ValueError("scales: expected at least one")
  if context.first and (labels == "swarm" or start in ("best", "average")):
    raise ValueError("labels, start: the swarm is what the first method of a run finds, and this is the first")
  context.teachers.check(labels)
  return Distillation(
    genotype(context.root, context.keep),
    context.teachers,
    labels=labels,
    members=members,
    start=start,
    scales=scales if start == "task_arithmetic" else (),
    steps=steps,
    validate_every=validate_every,
    learning_rate=learning_rate,
  )


class Distillation:
  """See `distill`. First it scores what it could start from, then what each `validate_every` steps lead to."""

  batch_size = 1
  writes_model = True
  variation = "gradient steps on verified answers"

  def __init__(
    self,
    space: Space,
    teachers: Teachers,
    *,
    labels: str,
    members: int,
    start: str,
    scales: Sequence[float],
    steps: int,
    validate_every: int,
    learning_rate: float,
  ):
    self.space = space
    self._teachers = teachers
    self._labels, self._members = labels, members
    self._start = start
    self._scales = tuple(scales)
    self._num_starts = max(len(scales), 1)
    self._steps, self._every = steps, validate_every
    self._rate: Callable[[jax.Array], jax.Array] = cosine(learning_rate, steps, WARM_UP)
    self.budget = self._num_starts + -(-steps // validate_every)
    self.num_teachers = 0 if labels == "references" else space.num_experts + members * (labels == "swarm")
    self._signal: TrainingSignal | None = None

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> Distilled:
    """See `Algorithm`; those who teach are asked.

    Raises:
      ValueError: if there is nothing to learn from.
    """
    del key
    self._signal = self._teachers.training_signal(labels=self._labels, members=self._members)
    _, num_tasks, num_samples = scored.values.shape
    start = self._first(initial)
    return Distilled(
      descent=begin_descent(start),
      best=jax.tree.map(jnp.copy, start),
      values=jnp.full((num_tasks, num_samples), jnp.nan, jnp.float32),
      scores=jnp.full(num_tasks, -jnp.inf, jnp.float32),
      count=jnp.int32(0),
      best_count=jnp.int32(0),
      first=jnp.int32(population_size(initial)),
    )

  def ask(self, state: Distilled, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`: one individual."""
    assert self._signal is not None
    signal = self._signal
    done = jnp.maximum(state.count - self._num_starts, 0) * self._every
    steps = done + jnp.arange(self._every)
    # Steps beyond the last do nothing: their rate is 0.
    rates = jnp.where(steps < self._steps, self._rate(jnp.minimum(steps, self._steps - 1)), 0.0)
    even = jnp.full(state.scores.shape, 1 / state.scores.shape[0], jnp.float32)

    def propose(state: Distilled) -> tuple[Descent, Any]:
      # Adam begins from nothing, whichever start is best.
      return begin_descent(self._trial(state)), jnp.full((self._every, *state.scores.shape), jnp.nan, jnp.float32)

    def go_on(state: Distilled) -> tuple[Descent, Any]:
      first = state.count == self._num_starts
      here = jax.tree.map(lambda own, best: jnp.where(first, best, own), state.descent.genotype, state.best)
      return descend(
        key, state.descent._replace(genotype=here), signal.data, even, rates, space=self.space, signal=signal
      )

    descent, losses = jax.lax.cond(state.count < self._num_starts, propose, go_on, state)
    note = {"loss": losses.mean(axis=0)[None], "steps": jnp.minimum(done + self._every, self._steps)[None]}
    note["steps"] = jnp.where(state.count < self._num_starts, 0, note["steps"])
    return population_of_one(descent.genotype), Info(note=note, extra={"descent": descent})

  def tell(self, state: Distilled, genotypes: Genotype, scored: Scored, info: Info) -> tuple[Distilled, Metrics]:
    """See `Algorithm`; a failed individual is never the best."""
    scored = scored.with_scores()
    scores = scored.scores[0].astype(jnp.float32)
    better = jnp.isfinite(scores).all() & (scores.mean() > state.scores.mean())

    def choose(new: Any, old: Any) -> Any:
      return jax.tree.map(lambda one, other: jnp.where(better, one, other), new, old)

    state = state.replace(
      descent=info.extra["descent"],
      best=choose(jax.tree.map(lambda leaf: leaf[0], genotypes), state.best),
      values=choose(scored.values[0], state.values),
      scores=choose(scores, state.scores),
      best_count=choose(state.count, state.best_count),
      count=state.count + 1,
    )
    return state, {"best_mean": state.scores.mean()}

  def population(self, state: Distilled) -> Population:
    """The best that was scored."""
    steps = max(int(state.best_count) + 1 - self._num_starts, 0) * self._every
    return Population(
      genotypes=population_of_one(state.best),
      values=np.asarray(state.values)[None],
      identities=int(state.first) + np.asarray(state.best_count)[None],
      scores=np.asarray(state.scores)[None],
      chosen={"steps": float(min(steps, self._steps))},
    )

  def _first(self, initial: Genotype) -> Genotype:
    """Where to begin; of the experts' sum the first scale."""
    if self._start in ("best", "average"):
      return self._teachers.average_of_swarm(self.space, 1 if self._start == "best" else AVERAGED)
    experts = jax.tree.map(lambda leaf: leaf[: self.space.num_experts], initial)
    return task_arithmetic(experts, self._scales[0] if self._scales else 0.0)

  def _trial(self, state: Distilled) -> Genotype:
    """What could be started from: for each count another scale, or the one start that there is."""
    if not self._scales:
      return state.best
    scale = jnp.asarray(self._scales, jnp.float32)[jnp.minimum(state.count, self._num_starts - 1)]
    return task_arithmetic(self.space.experts, scale)
