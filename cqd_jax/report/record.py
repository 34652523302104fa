"""What a run leaves behind to be read: the one thing that reports and figures are made from."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cqd_jax.store.costs import Cost
from cqd_jax.store.individuals import Individuals


@dataclasses.dataclass(frozen=True)
class Sample:
  """One question, what the model answered, and what executing it was worth.

  Attributes:
    task: its name.
    prompt: what was asked.
    gold: a right answer; "" if none is known.
    answer: what the model said; "" if it did not answer in words.
    score: 1: right, 0: wrong; what is between, beyond, or NaN is shown as it is.
    pictures: to be shown side by side, each its caption and a PNG in base64.
    turns: roles and texts of a dialogue that is more than a question and an answer; "executed" is what was executed of
      the answer before.
    reason: why it failed, where that is known; else "".
  """

  task: str
  prompt: str
  gold: str
  answer: str
  score: float
  pictures: Sequence[tuple[str, str]] = ()
  turns: Sequence[tuple[str, str]] = ()
  reason: str = ""

  @property
  def passed(self) -> bool:
    """Whether the answer is right."""
    return self.score >= 1


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """A run, finished or not. Stages not reached have empty rows, samples or metrics.

  Attributes:
    name: of the run.
    finished: whether all stages are done.
    task_names: K names.
    num_planned: children that the run will make in all.
    facts: short lines about the run by name, as {"seed": "0", "device": "cpu"}; in the order to be shown.
    settings: YAML of all settings.
    edges: for each task the float32 edges of its grid cells, ascending; None where cells are Voronoi cells.
    bins: `[M, K]` int, the cell of each individual along each task, by the grid's rule; None as `edges`. In archive k
      its cell is `bins[:, [j != k]]`.
    individuals: all that were scored.
    metrics: figures after each batch by name, the batches in order from 1 on: "coverage", "qd_score", "max_fitness"
      `[T, K]`; "best_mean", "num_elites" `[T]`; "seconds" `[T]`.
    rows: the score table on test, each `{"name": str, "scores": {task: float}, "mean": float | None, "minimum":
      float | None, "evaluations": int, "solved": {"3": float}, ...}`; see `cqd_jax.run.table.Row`.
    swarm_sizes: for how many members `solved` reports the share of questions solved together.
    samples: questions of the test split, as the best model answered them.
    best: identity of the living elite with the best mean score; None if there is none.
    aggregated: identities of the K elites that the aggregate is made of, by archive.
    costs: what scoring took, by method.
  """

  name: str
  finished: bool
  task_names: Sequence[str]
  num_planned: int
  facts: Mapping[str, str]
  settings: str
  edges: Sequence[np.ndarray] | None
  bins: np.ndarray | None
  individuals: Individuals
  metrics: Mapping[str, np.ndarray]
  rows: Sequence[Mapping[str, Any]]
  swarm_sizes: Sequence[int]
  samples: Sequence[Sample]
  best: int | None
  aggregated: Sequence[int]
  costs: Sequence[Cost] = ()

  @property
  def num_experts(self) -> int:
    """How many of the individuals that began the run are experts; they are the first."""
    born = self.individuals.born
    return sum(not text for text, batch in zip(self.individuals.mutation, born, strict=True) if batch == 0)

  def elites(self, archive: int, batch: int | None = None) -> dict[int | tuple[int, ...], int]:
    """Who holds the cells of an archive after a batch (None: the last): identity by cell.

    A cell is the tuple of its bins along the other tasks in order; without a grid there are no cells to tell apart and
    every individual that was taken is its own.
    """
    held: dict[int | tuple[int, ...], int] = {}
    for identity in np.flatnonzero(self.individuals.taken[:, archive]):
      if batch is not None and self.individuals.born[identity] > batch:
        break
      cell = int(identity) if self.bins is None else tuple(int(b) for b in np.delete(self.bins[identity], archive))
      held[cell] = int(identity)
    return held

  def ancestors(self, identity: int) -> list[int]:
    """As `Individuals.ancestors`."""
    return self.individuals.ancestors(identity)
