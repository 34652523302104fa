"""How samples that come from a file are divided into splits."""

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from cqd_jax.tasks.task import Split

Sample = TypeVar("Sample")

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_FIRST_SERVED: tuple[Split, ...] = ("test", "validation", "train")
"""So that more training samples leave what is asked for scores as it was."""


def divide_by_seed(
  samples: Sequence[Sample], sizes: Mapping[Split, int], seed: int, source: str
) -> dict[Split, list[Sample]]:
  """Divides samples at random: each split gets as many as `sizes` has for it, no sample is in two.

  Where there are fewer samples than that, training first gives up what it has beyond the others together; then all are
  shared out in proportion to the sizes, at least one for each split that is to have any.

  Args:
    samples: of a file.
    sizes: how many each split is to have.
    seed: of the draw; the test split is drawn first.
    source: the file, for messages.

  Raises:
    ValueError: naming the source, if a split would be empty.
  """
  asked = {split: sizes[split] for split in SPLITS if sizes[split] > 0}
  if len(samples) < len(asked):
    raise ValueError(f"{source}: expected at least one sample for each of {', '.join(asked)}, got {len(samples)}")
  shuffled = list(samples)
  random.Random(seed).shuffle(shuffled)
  counts = _shares(len(samples), asked)
  divided: dict[Split, list[Sample]] = {split: [] for split in SPLITS}
  for split in _FIRST_SERVED:
    count = counts.get(split, 0)
    divided[split], shuffled = shuffled[:count], shuffled[count:]
  return divided


def limited_by_seed(
  splits: Mapping[Split, Sequence[Sample]], sizes: Mapping[Split, int], seed: int, source: str
) -> dict[Split, list[Sample]]:
  """Takes at most as many samples of each split as `sizes` has for it, at random, in the order of the file.

  Raises:
    ValueError: naming the source, if there is no sample for a split that is to have any.
  """
  limited: dict[Split, list[Sample]] = {}
  for split in SPLITS:
    own, size = splits.get(split, ()), sizes[split]
    if size > 0 and not own:
      raise ValueError(f"{source}: expected samples of {split}, got none")
    places = sorted(random.Random(f"{seed} {split}").sample(range(len(own)), min(size, len(own))))
    limited[split] = [own[place] for place in places]
  return limited


def _shares(total: int, asked: Mapping[Split, int]) -> dict[Split, int]:
  """The sizes, or as large parts of the total as there are samples."""
  wanted = sum(asked.values())
  if total >= wanted:
    return dict(asked)
  others = wanted - asked.get("train", 0)
  if asked.get("train", 0) > others > 0:
    return _shares(total, {**asked, "train": max(others, total - others)})
  shares = {split: max(1, total * size // wanted) for split, size in asked.items()}
  while sum(shares.values()) > total:
    largest = max(shares, key=lambda split: shares[split])
    shares[largest] -= 1
  largest = max(asked, key=lambda split: asked[split])
  shares[largest] += total - sum(shares.values())
  return shares


def in_several_splits(splits: Mapping[Split, Sequence[tuple[str, str]]]) -> list[list[tuple[Split, str]]]:
  """Texts that are in more than one split; blanks and case do not tell texts apart.

  Args:
    splits: of each split texts, and where each stands.

  Returns:
    For each such text the splits, and where it first stands in each.
  """
  seen: dict[str, dict[Split, str]] = {}
  for split, texts in splits.items():
    for text, where in texts:
      seen.setdefault(" ".join(text.lower().split()), {}).setdefault(split, where)
  return [list(found.items()) for found in seen.values() if len(found) > 1]
