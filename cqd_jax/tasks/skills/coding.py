"""Coding: the body of a Python function of a list of integers, graded by unit tests.

"sum of the even numbers of xs each plus 5" asks for `return sum([x+5 for x in xs if x%2==0])`.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from importlib import resources

from cqd_jax.tasks.execution import JSON, Harness
from cqd_jax.tasks.skills.grammar import SIZES, Grammar, Skill, pick
from cqd_jax.tasks.task import Split

# Single numbers tell thresholds and multiples apart where the whole is reduced to its largest or smallest; the longer
# lists tell sums, orders and counts apart.
INPUTS: list[list[int]] = [
  [],
  *([x] for x in range(-10, 13)),
  [3, -7, 12, 0, 5, 5, -2, 8, 21, -15, 10],
  [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6],
  [-3, 14, 14, 2, -9, 30, 7, -12, 6, 1],
  [18, -5, 4, -11, 25, 0, 9, -8, 16, 3, 3],
  [-20, -1, -14, -6, -9, -35],
  [40, 11, 27, 16, 63, 24, 35],
  [2, 2, -2, 2, 10, -2],
  [-21, 13, 20, -16, 28, 6, -18, 45, -27],
]


@dataclasses.dataclass(frozen=True)
class Meaning:
  """Keep the numbers that `keep` (with `bound`), change each by `change` (with `amount`), then `reduce`."""

  reduce: str
  keep: str = ""
  bound: int = 0
  change: str = ""
  amount: int = 0


KEEPS: Mapping[str, Callable[[int, int], bool]] = {
  "": lambda x, n: True,
  "even": lambda x, n: x % 2 == 0,
  "odd": lambda x, n: x % 2 == 1,
  "positive": lambda x, n: x > 0,
  "negative": lambda x, n: x < 0,
  "above": lambda x, n: x > n,
  "below": lambda x, n: x < n,
  "multiple": lambda x, n: x % n == 0,
}
CHANGES: Mapping[str, Callable[[int, int], int]] = {
  "": lambda x, n: x,
  "times": lambda x, n: x * n,
  "plus": lambda x, n: x + n,
  "minus": lambda x, n: x - n,
  "squared": lambda x, n: x * x,
}
REDUCES: Mapping[str, Callable[[list[int]], int | list[int]]] = {
  "sum": sum,
  "max": max,
  "min": min,
  "count": len,
  "list": list,
  "sorted": sorted,
}

# Below 1 and multiples of 2 are left out: for some reductions they mean the same as negative and even.
BOUNDS: Mapping[str, range] = {
  "above": range(2, 10),
  "below": range(2, 10),
  "multiple": range(3, 10),
}
AMOUNTS: Mapping[str, range] = {
  "times": range(2, 10),
  "plus": range(1, 10),
  "minus": range(1, 10),
}

REDUCE_WORDS = {
  "sum": ("sum of the", "total of the", "add the"),
  "max": ("max of the", "largest of the", "highest of the"),
  "min": ("min of the", "smallest of the", "lowest of the"),
  "count": ("count the", "how many", "number of"),
  "list": ("list the", "list of the", "all the"),
  "sorted": ("sorted list of the", "sorted", "sort the"),
}
NUMBERS_WORDS = {
  "": ("numbers of xs",),
  "even": ("even numbers of xs", "numbers of xs that are even"),
  "odd": ("odd numbers of xs", "numbers of xs that are odd"),
  "positive": ("positive numbers of xs", "numbers of xs that are positive"),
  "negative": ("negative numbers of xs", "numbers of xs that are negative"),
  "above": ("numbers of xs above {}", "numbers of xs over {}"),
  "below": ("numbers of xs below {}", "numbers of xs under {}"),
  "multiple": ("multiples of {} of xs", "numbers of xs that are multiples of {}"),
}
# "each" is always said: the sum of the numbers plus 5 would be another thing
CHANGE_WORDS = {
  "": ("",),
  "times": (" each times {}", " times {} each"),
  "plus": (" each plus {}", " plus {} each"),
  "minus": (" each minus {}", " minus {} each"),
  "squared": (" each squared", " squared each"),
}

KEEP_CODE = {
  "": "",
  "even": " if x%2==0",
  "odd": " if x%2==1",
  "positive": " if x>0",
  "negative": " if x<0",
  "above": " if x>{}",
  "below": " if x<{}",
  "multiple": " if x%{}==0",
}
CHANGE_CODE = {"": "x", "times": "x*{}", "plus": "x+{}", "minus": "x-{}", "squared": "x*x"}
REDUCE_CODE = {
  "sum": "sum([{}])",
  "max": "max([{}])",
  "min": "min([{}])",
  "count": "len([{}])",
  "list": "[{}]",
  "sorted": "sorted([{}])",
}


def draw(rng: random.Random) -> Meaning:
  """A random meaning; what is counted is not changed first, since that would not change the count."""
  reduce = pick(rng, tuple(REDUCES))
  keep = pick(rng, tuple(KEEPS))
  change = "" if reduce == "count" else pick(rng, tuple(CHANGES))
  bound = pick(rng, BOUNDS.get(keep, range(1)))
  return Meaning(reduce, keep, bound, change, pick(rng, AMOUNTS.get(change, range(1))))


def prompt(meaning: Meaning, rng: random.Random) -> str:
  """The meaning in English."""
  start = pick(rng, REDUCE_WORDS[meaning.reduce])
  numbers = pick(rng, NUMBERS_WORDS[meaning.keep]).format(meaning.bound)
  return f"{start} {numbers}{pick(rng, CHANGE_WORDS[meaning.change]).format(meaning.amount)}"


def answer(meaning: Meaning) -> str:
  """The meaning in Python."""
  each = CHANGE_CODE[meaning.change].format(meaning.amount)
  kept = KEEP_CODE[meaning.keep].format(meaning.bound)
  return "return " + REDUCE_CODE[meaning.reduce].format(f"{each} for x in xs{kept}")


@functools.cache
def given(meaning: Meaning) -> list[str]:
  """What the harness returns: the meaning itself evaluated on the inputs, not its Python text."""
  return [_evaluate(meaning, xs) for xs in INPUTS]


def near_misses(meaning: Meaning) -> Iterator[Meaning]:
  """Another reduction, no filter, no change, and numbers off by one.

  So the few pairs that mean the same are not asked for: x-4 adds nothing to a sum at 4, be that above the bound or not.
  """
  for other in REDUCES:
    if other != meaning.reduce:
      yield dataclasses.replace(meaning, reduce=other)
  if meaning.keep:
    yield dataclasses.replace(meaning, keep="", bound=0)
  if meaning.change:
    yield dataclasses.replace(meaning, change="", amount=0)
  for step in (-1, 1):
    if meaning.bound:
      yield dataclasses.replace(meaning, bound=meaning.bound + step)
    if meaning.amount:
      yield dataclasses.replace(meaning, amount=meaning.amount + step)


def coding(*, sizes: Mapping[Split, int] = SIZES, seed: int = 0) -> Skill[Meaning]:
  """The coding task; `sizes` examples per split, drawn by `seed`.

  An answer passes if on every hidden list it returns the expected value of exactly the expected type (1.0 and True
  are not 1, a tuple is not a list), and raises `ValueError` where Python's own `max` and `min` have nothing to choose
  from.
  """
  source = resources.files(__package__).joinpath("harness_coding.py").read_text(encoding="utf-8")
  return Skill(
    name="coding",
    harness=Harness("coding", source, INPUTS),
    grammar=Grammar(draw, prompt, answer, given, given, near_misses),
    verdict=_same,
    sizes=sizes,
    seed=seed,
  )


def _evaluate(meaning: Meaning, xs: list[int]) -> str:
  keep, change = KEEPS[meaning.keep], CHANGES[meaning.change]
  numbers = [change(x, meaning.amount) for x in xs if keep(x, meaning.bound)]
  if not numbers and meaning.reduce in ("max", "min"):
    return "raises ValueError"
  return repr(REDUCES[meaning.reduce](numbers))


def _same(expected: JSON, value: JSON) -> bool:
  # the expected value is a list of texts, which equals nothing but a list of the same texts
  return type(value) is list and value == expected
