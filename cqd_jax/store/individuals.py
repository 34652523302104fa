"""Everyone who was ever scored in a run, as arrays."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Individuals:
  """Everyone who was ever scored, in the order of identity: row i is individual i. The first are the experts.

  Attributes:
    born: `[M]` int, the batch in which it was offered; 0: the initial population.
    archive: `[M]` int, the archive whose elites its parents were; -1: none.
    parents: `[M, 2]` int identities; -1: none.
    weights: for each, its merge weights `[2, G]`, one pair a group of weights; None without parents.
    mutation: for each, what was done after merging, as "expert_svd 0.3"; "" for nothing. Of the initial population
      those with a text are no experts, but were made of them as it says.
    scores: `[M, K]` float; NaN where scoring failed.
    taken: `[M, K]` bool, whether archive k took it when it was offered.
    seconds: `[M]` float, its share of the time in which its batch was scored.
  """

  born: np.ndarray
  archive: np.ndarray
  parents: np.ndarray
  weights: Sequence[np.ndarray | None]
  mutation: Sequence[str]
  scores: np.ndarray
  taken: np.ndarray
  seconds: np.ndarray

  def __len__(self) -> int:
    return len(self.born)

  def ancestors(self, identity: int) -> list[int]:
    """An individual and all that it descends from, ascending; no duplicates."""
    found = {identity}
    waiting = [identity]
    while waiting:
      for parent in self.parents[waiting.pop()]:
        if parent >= 0 and int(parent) not in found:
          found.add(int(parent))
          waiting.append(int(parent))
    return sorted(found)
