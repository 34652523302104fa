"""A few members that complement one another: what a population solves together."""

import numpy as np
from jaxtyping import Bool


def choose_members(passed: Bool[np.ndarray, "N B"], size: int) -> list[int]:
  """Chooses members greedily: each next one adds the most prompts that no earlier one solves.

  Among equals the one that solves more prompts by itself, then the first. Greedy choice covers at least 1 - 1/e of
  what the best choice would (Nemhauser et al. 1978).

  Args:
    passed: which of B prompts each of N candidates solves.
    size: how many to choose; fewer are returned if there are fewer.

  Returns:
    Indices, in the order chosen.
  """
  if size < 1:
    raise ValueError(f"size: expected at least 1, got {size}")
  alone = passed.sum(axis=1)
  covered = np.zeros(passed.shape[1], bool)
  chosen: list[int] = []
  for _ in range(min(size, len(passed))):
    gains = (passed & ~covered).sum(axis=1)
    order = np.lexsort((np.arange(len(passed)), -alone, -gains))
    best = next(int(index) for index in order if index not in chosen)
    chosen.append(best)
    covered |= passed[best]
  return chosen


def share_solved(passed: Bool[np.ndarray, "N B"]) -> float:
  """The share of prompts that at least one member solves."""
  return float(passed.any(axis=0).mean())
