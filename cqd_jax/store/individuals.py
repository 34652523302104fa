"""Everyone who was ever scored in a run, as arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LONGEST_REMARK = 80
"""Of characters that are shown of a note."""


@dataclasses.dataclass(frozen=True)
class Individuals:
  """Everyone who was ever scored, in the order of identity: row i is individual i. The first are the experts.

  Attributes:
    born: `[M]` int, the batch in which it was offered; 0: the initial population.
    archive: `[M]` int, the archive whose elites its parents were; -1: none.
    parents: `[M, 2]` int identities; -1: none.
    notes: for each, what else is known of how it was made, as JSON by name; {} where nothing is. "weights" are the
      merge weights `[2, G]` of its parents, one pair for each group of weights.
    mutation: for each, what was done after merging, as "expert_svd 0.3"; "" for nothing. Of the initial population
      those with a text are no experts, but were made of them as it says.
    scores: `[M, K]` float; NaN where scoring failed.
    taken: `[M, K]` bool, whether archive k took it when it was offered.
    seconds: `[M]` float, its share of the time in which its batch was scored.
  """

  born: np.ndarray
  archive: np.ndarray
  parents: np.ndarray
  notes: Sequence[Mapping[str, Any]]
  mutation: Sequence[str]
  scores: np.ndarray
  taken: np.ndarray
  seconds: np.ndarray

  def __len__(self) -> int:
    return len(self.born)

  def weights(self, identity: int) -> np.ndarray | None:
    """The merge weights `[2, G]` of an individual; None if its notes have none, or a note of that name is no such."""
    try:
      weights = np.asarray(self.notes[identity].get("weights"), float)
    except (TypeError, ValueError):  # texts, lists of unequal length
      return None
    return weights if weights.ndim == 2 and weights.shape[0] == 2 and weights.size else None

  def remarks(self, identity: int) -> list[tuple[str, str]]:
    """The notes of an individual but its merge weights, by name, each as a few words."""
    merged = self.weights(identity) is not None
    return [(name, _said(value)) for name, value in self.notes[identity].items() if name != "weights" or not merged]

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


def _said(value: Any) -> str:
  """JSON as one short line: numbers to 3 digits, of many their mean and range."""
  text = " ".join(_words(value).split())
  return text if len(text) <= LONGEST_REMARK else f"{text[: LONGEST_REMARK - 1]}\u2026"


def _words(value: Any) -> str:
  if value is None:
    return "not finite"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return f"{value:.3g}"
  if isinstance(value, Mapping):
    return "; ".join(f"{name}: {_words(entry)}" for name, entry in value.items())
  if not isinstance(value, list):
    return f"{value}"
  entries = _entries(value)
  if len(entries) > 1 and all(type(entry) in (int, float, type(None)) for entry in entries):
    finite = [float(entry) for entry in entries if entry is not None]
    if not finite:
      return _words(None)
    mean, low, high = (_words(float(number)) for number in (np.mean(finite), min(finite), max(finite)))
    return f"{mean} on average, {low} to {high} over {len(entries)}"
  return ", ".join(map(_words, entries)) or "none"


def _entries(value: Any) -> list[Any]:
  """All that nested lists hold."""
  return [entry for part in value for entry in _entries(part)] if isinstance(value, list) else [value]
