import itertools
import math
from collections import defaultdict

import pytest

from cqd_jax.tasks.execution import Job
from cqd_jax.tasks.skills import coding as make_coding
from cqd_jax.tasks.skills.coding import (
  AMOUNTS,
  BOUNDS,
  CHANGES,
  INPUTS,
  KEEPS,
  REDUCES,
  Meaning,
  answer,
  given,
  near_misses,
)
from cqd_jax.tasks.task import Example, grade


@pytest.fixture(scope="module")
def task():
  return make_coding(sizes={"train": 0, "validation": 0, "test": 0})


@pytest.fixture(scope="module")
def execute(task, in_process):
  return in_process(task.harness)


def every_meaning():
  for reduce, keep, change in itertools.product(REDUCES, KEEPS, CHANGES):
    if reduce != "count" or not change:
      for bound, amount in itertools.product(BOUNDS.get(keep, [0]), AMOUNTS.get(change, [0])):
        yield Meaning(reduce, keep, bound, change, amount)


def passes(task, execute, meaning, text):
  return bool(grade(task, [Example("", answer(meaning), given(meaning))], [text], execute)[0])


def test_no_two_meanings_of_the_whole_grammar_give_the_same_and_are_asked():
  meanings = list(every_meaning())
  # 5 reductions with 28 filters and 28 changes, and counting with 28 filters
  assert len(meanings) == 5 * 28 * 28 + 28
  assert len({answer(meaning) for meaning in meanings}) == len(meanings)
  groups = defaultdict(list)
  for meaning in meanings:
    groups[tuple(given(meaning))].append(meaning)
  alike = [meaning for group in groups.values() if len(group) > 1 for meaning in group]
  # x - 4 adds nothing at 4, so whether 4 itself is above (or below) the bound is all one to the sum
  assert all(meaning.reduce == "sum" and meaning.change == "minus" for meaning in alike)
  # above b for b from 2 to 8 with b + 1 as the other, and below for 2 to 8 likewise
  assert len(alike) == 2 * (7 + 7)
  for meaning in alike:
    assert given(meaning) in [given(other) for other in near_misses(meaning)], "a meaning that is asked for"


def test_the_documented_example():
  meaning = Meaning("sum", "even", 0, "plus", 5)
  assert answer(meaning) == "return sum([x+5 for x in xs if x%2==0])"
  results = dict(zip(map(tuple, INPUTS), given(meaning), strict=True))
  assert results[()] == "0"
  assert results[(4,)] == "9"
  assert results[(3,)] == "0"
  # 2, 2, -2, 2, 10 and -2 are all even: their sum is 14, and seven numbers gain 35
  assert results[(2, 2, -2, 2, 10, -2)] == str(12 + 6 * 5)


def test_nothing_to_choose_from_must_raise_as_python_does(task, execute):
  meaning = Meaning("max", "above", 5)
  assert given(meaning)[INPUTS.index([5])] == "raises ValueError"
  assert passes(task, execute, meaning, "return max([x for x in xs if x>5])")
  assert passes(task, execute, meaning, "return max(x for x in xs if x > 5)")
  assert passes(task, execute, meaning, "return sorted([x for x in xs if 5<x])[-1]") is False  # IndexError
  assert passes(task, execute, meaning, "return max([x for x in xs if x>5], default=0)") is False


@pytest.mark.parametrize(
  ("text", "right"),
  [
    ("return len(xs)", True),
    ("return sum(1 for x in xs)", True),
    ("return float(len(xs))", False),
    ("return str(len(xs))", False),
    ("return len(xs) if len(xs)>1 else bool(xs)", False),
    ("return [len(xs)]", False),
    ("print(len(xs))", False),
    ("return len(xs", False),
    ("", False),
    ("return len(ys)", False),
    ("xs.clear(); return len(xs)", False),
    ("n=len(xs); xs.clear(); return n", True),
    ("\n  return len(xs)", True),
    ("return len(xs)\nf=len", True),
    ("return len(xs)\ndel f", False),
    ("return 1is 1", False),  # a SyntaxWarning, which is nobody's business
    ("raise KeyError", False),
    ("return 'x'*10**6", False),
    ("return f(xs)", False),
  ],
)
def test_counting_is_judged_by_value_and_type(task, execute, text, right):
  assert passes(task, execute, Meaning("count"), text) is right


@pytest.mark.parametrize(
  ("text", "right"),
  [
    ("return xs", True),
    ("return list(xs)", True),
    ("return tuple(xs)", False),
    ("return iter(xs)", False),
    ("return [float(x) for x in xs]", False),
    ("return [x if x!=1 else True for x in xs]", False),
    ("return sorted(xs)", False),
    ("return set(xs)", False),
    ("return repr(xs)", False),
  ],
)
def test_lists_are_judged_by_order_and_types(task, execute, text, right):
  assert passes(task, execute, Meaning("list"), text) is right


def test_one_call_cannot_change_what_another_is_given(execute):
  [outcome] = execute([Job("coding", "xs.append(1); return len(xs)")])
  assert outcome.value == [repr(len(xs) + 1) for xs in INPUTS]


def test_results_are_bounded(execute):
  [outcome] = execute([Job("coding", "return 'x'*10**6")])
  assert {len(text) for text in outcome.value} == {300}
  assert max(len(text) for meaning in every_meaning() for text in given(meaning)) < 300


def test_expected_values_agree_with_independent_arithmetic():
  xs = INPUTS[24]
  assert given(Meaning("sum", "multiple", 3, "squared"))[24] == str(sum(x**2 for x in xs if math.gcd(x, 3) == 3))
  assert given(Meaning("sorted", "odd", 0, "times", 4))[24] == str(sorted(4 * x for x in xs if x & 1))
  assert given(Meaning("min", "below", 4, "minus", 2))[24] == str(min(xs) - 2)
