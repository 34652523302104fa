"""Whose answers a run learns from: the experts, and the swarm that its first method found."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from cqd_jax.genotypes.space import Space, population_size, take
from cqd_jax.run.scoring import Scorer
from cqd_jax.search.algorithm import Population
from cqd_jax.search.swarm import choose_members
from cqd_jax.store.history import History
from cqd_jax.tasks.problem import Labeled, Problem, Trainable, TrainingSignal, Verified, task_scores
from cqd_jax.terminal.progress import progress
from cqd_jax.types import Genotype

MOST_ANSWERS = 8
"""To one question, of those that are learned: the first that were given."""


class RunTeachers:
  """See `cqd_jax.search.algorithm.Teachers`.

  Args:
    problem: whose questions they answer.
    root: of the run; its experts are asked first.
    scorer: asks, and remembers.
    history: where their answers are.
    console: where progress goes.
    check_interrupt: raises where somebody asked to stop.

  Attributes:
    swarm: what the first method offers, and in which space, as soon as it is known.
  """

  def __init__(
    self,
    problem: Problem,
    root: Space,
    scorer: Scorer,
    history: History,
    console: Console,
    check_interrupt: Callable[[], None],
  ):
    self._problem = problem
    self._root = root
    self._scorer = scorer
    self._history = history
    self._console = console
    self._check_interrupt = check_interrupt
    self.swarm: tuple[Population, Space] | None = None

  def check(self, labels: str) -> None:
    """See `Teachers`."""
    del labels
    if not isinstance(self._problem, Trainable):
      raise ValueError(f"labels: {type(self._problem).__name__} has no training signal that gradients could follow")

  def training_signal(self, *, labels: str, members: int) -> TrainingSignal:
    """See `Teachers`."""
    problem = self._problem
    assert isinstance(problem, Trainable)
    if not isinstance(problem, Labeled):
      return problem.training_signal(())
    if labels == "references":
      return problem.training_signal(problem.references("labels"))
    names = self._ask(self._root.experts, self._root)
    if labels == "swarm":
      names += self._ask(*self._members(members))
    return problem.training_signal(self._verified(names))

  def average_of_swarm(self, space: Space, size: int) -> Genotype:
    """See `Teachers`."""
    population, own = self._known_swarm()
    genotypes, whole = own.as_scored(population.genotypes), own.scored_in
    if space.to_parent is not None or whole.name != space.name:
      raise ValueError(f"start: the swarm's individuals are {whole.name}, which cannot be written as {space.name}")
    means = task_scores(np.asarray(population.values)).mean(axis=-1)
    best = np.argsort(-np.where(np.isnan(means), -np.inf, means), kind="stable")[:size]

    def average(leaf: jax.Array) -> jax.Array:
      return leaf[best].astype(jnp.float32).mean(axis=0).astype(leaf.dtype)

    return jax.tree.map(average, genotypes)

  def _verified(self, names: list[str]) -> list[Verified]:
    """What individuals answered right, question by question."""
    found = self._history.verified("labels", self._problem.fingerprint("labels"), names)
    return [
      Verified(task, sample, turns) for (task, sample), own in sorted(found.items()) for turns in [*own][:MOST_ANSWERS]
    ]

  def _members(self, count: int) -> tuple[Genotype, Space]:
    """Those of the swarm that complement one another best on validation."""
    population, own = self._known_swarm()
    values = np.asarray(population.values)
    chosen = choose_members(values.reshape(len(values), -1), count)
    return take(population.genotypes, np.asarray(chosen)), own

  def _ask(self, population: Genotype, space: Space) -> list[str]:
    """Scores individuals on the split "labels"; their names."""
    size = population_size(population)
    names: list[str] = []
    with progress(self._console, "answering training questions", size) as advance:
      for index in range(size):
        self._check_interrupt()
        judged = self._scorer.score("labels", take(population, np.asarray([index])), space)
        names += judged.names
        advance(note=f"{np.nanmean(judged.values):.3f} passed")
    return names

  def _known_swarm(self) -> tuple[Population, Space]:
    if self.swarm is None:
      raise ValueError("labels: the swarm is what the first method finds, which has not run")
    return self.swarm
