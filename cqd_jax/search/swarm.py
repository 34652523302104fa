"""A few members that complement one another: what a population solves together."""

import numpy as np
from jaxtyping import Bool, Float


def choose_members(values: Bool[np.ndarray, "N B"] | Float[np.ndarray, "N B"], size: int) -> list[int]:
  """Chooses members greedily: each next one adds the most to what the best member reaches on each sample.

  Among equals the one that reaches more by itself, then the first. Greedy choice covers at least 1 - 1/e of what the
  best choice would (Nemhauser et al. 1978).

  Args:
    values: of N candidates on B samples: solved or not, or any value of at least 0. NaN counts as 0.
    size: how many to choose; fewer are returned if there are fewer.

  Returns:
    Indices, in the order chosen.
  """
  if size < 1:
    raise ValueError(f"size: expected at least 1, got {size}")
  known = np.nan_to_num(np.asarray(values, np.float64))
  alone = known.sum(axis=1)
  covered = np.zeros(known.shape[1])
  chosen: list[int] = []
  for _ in range(min(size, len(known))):
    gains = np.maximum(known - covered, 0).sum(axis=1)
    order = np.lexsort((np.arange(len(known)), -alone, -gains))
    best = next(int(index) for index in order if index not in chosen)
    chosen.append(best)
    covered = np.maximum(covered, known[best])
  return chosen


def share_solved(values: Bool[np.ndarray, "N B"] | Float[np.ndarray, "N B"]) -> float:
  """The mean over samples of the best member's value: the share that at least one member solves.

  Columns of NaN, which pad tasks with fewer samples, do not count.
  """
  values = np.asarray(values, np.float64)
  there = ~np.isnan(values).all(axis=0)
  return float(np.nanmax(values[:, there], axis=0).mean())
