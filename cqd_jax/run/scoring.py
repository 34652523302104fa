"""Scores by individual: nobody is scored twice in a run, whatever method, batch, split or session asks."""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from cqd_jax.genotypes.space import Space, take
from cqd_jax.store.evaluations import Evaluation
from cqd_jax.store.history import History
from cqd_jax.tasks.problem import Problem, Scored, task_scores
from cqd_jax.tasks.task import AskedSplit
from cqd_jax.trees import fingerprint
from cqd_jax.types import Genotype


@dataclasses.dataclass
class Clock:
  """Where the time of a run goes.

  Attributes:
    candidates: individuals scored.
    samples: answers that were judged.
    score_s: seconds of scoring.
    record_s: seconds of writing history, checkpoints and metrics, as far as a search waits for it.
    iterate_s: seconds of all iterations, scoring included.
  """

  candidates: int = 0
  samples: int = 0
  score_s: float = 0.0
  record_s: float = 0.0
  iterate_s: float = 0.0

  @contextlib.contextmanager
  def recording(self) -> Iterator[None]:
    """Counts a block as recording."""
    started = time.perf_counter()
    yield
    self.record_s += time.perf_counter() - started


class Judged(NamedTuple):
  """What is known of P individuals.

  Attributes:
    values: float32 `[P, K, B]`, as in `Scored`.
    scores: float64 `[P, K]`, as the history keeps them.
    names: under which their values and answers are remembered.
    seconds: that scoring them took, now or then.
  """

  values: np.ndarray
  scores: np.ndarray
  names: list[str]
  seconds: float


class Scorer:
  """A problem whose scores are kept in the history, by the bits of each individual.

  Args:
    problem: scores whom nobody has scored.
    history: where scores are kept.
    clock: counts the scoring.
  """

  def __init__(self, problem: Problem, history: History, clock: Clock):
    self.problem = problem
    self._history = history
    self._clock = clock

  def score(self, split: AskedSplit, population: Genotype, space: Space) -> Judged:
    """How P individuals (leaves `[P, ...]`, of any space) score.

    Raises:
      ValueError: if the problem gives values of another shape than `[P, K, B]`.
    """
    individuals, own = space.as_scored(population), space.scored_in
    names = names_of(individuals, own)
    problem = self.problem.fingerprint(split)
    known = self._history.recall(split, problem, names)
    fresh = [index for index, name in enumerate(names) if name not in known and name not in names[:index]]
    if fresh:
      asked = individuals if len(fresh) == len(names) else take(individuals, np.asarray(fresh))
      scored = self._score(split, asked, own, len(fresh))
      new = dict(zip((names[index] for index in fresh), evaluations_of(scored), strict=True))
      self.remember(split, new, scored.seconds)
      known |= {name: (own.values, scored.seconds / len(fresh)) for name, own in new.items()}
    values = np.stack([known[name][0] for name in names])
    return Judged(values, task_scores(values), names, sum(known[name][1] for name in names))

  def remember(self, split: AskedSplit, evaluations: Mapping[str, Evaluation], seconds: float) -> None:
    """Keeps what is known of individuals by their names; `seconds` is what all of them took."""
    with self._clock.recording():
      each = seconds / max(len(evaluations), 1)
      self._history.remember(split, self.problem.fingerprint(split), evaluations, each)

  def _score(self, split: AskedSplit, individuals: Genotype, space: Space, size: int) -> Scored:
    started = time.perf_counter()
    scored = self.problem.score(split, individuals, space)
    values = np.asarray(scored.values, np.float32)
    if values.ndim != 3 or values.shape[:2] != (size, len(self.problem.task_names)):
      raise ValueError(
        f"score: expected values [{size} individuals, {len(self.problem.task_names)} tasks, samples], "
        f"got shape {values.shape}"
      )
    self._clock.candidates += size
    self._clock.samples += int((~np.isnan(values)).sum())
    self._clock.score_s += time.perf_counter() - started
    return scored._replace(values=values)


def evaluations_of(scored: Scored) -> list[Evaluation]:
  """One for each individual."""
  return [
    Evaluation(
      values,
      scored.verified[index] if scored.verified else (),
      scored.usage[index] if scored.usage else None,
      scored.transcripts[index] if scored.transcripts else (),
    )
    for index, values in enumerate(scored.values)
  ]


def names_of(individuals: Genotype, space: Space) -> list[str]:
  """What individuals of a space that scores are called: digests of their bits, shapes and space."""
  return names_from(np.asarray(checksums(individuals)), individuals, space)


def names_from(sums: np.ndarray, individuals: Genotype, space: Space) -> list[str]:
  """The same from `checksums`; of `individuals` only the shapes matter."""
  leaves, structure = jax.tree.flatten(individuals)
  about = f"{space.name} {structure} {[(leaf.shape[1:], str(leaf.dtype)) for leaf in leaves]}".encode()
  return [hashlib.blake2b(about + own.tobytes(), digest_size=16).hexdigest() for own in sums]


@jax.jit
def checksums(individuals: Genotype) -> jax.Array:
  """Of each leaf of each of P individuals, uint32 `[P, L, 2]`; see `cqd_jax.trees.fingerprint`."""
  sums: jax.Array = jax.vmap(fingerprint)(individuals)
  return sums
