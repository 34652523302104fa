"""Members that complement one another: greedily by hand and by brute force, verdicts and any other values."""

import itertools

import numpy as np
import pytest

from cqd_jax.search.swarm import choose_members, share_solved

NAN = float("nan")


def test_members_are_chosen_greedily():
  passed = np.array(
    [
      [1, 1, 1, 0, 0, 0],
      [0, 1, 1, 1, 1, 0],
      [1, 0, 0, 0, 0, 1],
      [0, 0, 0, 0, 0, 0],
    ],
    bool,
  )
  assert choose_members(passed, 1) == [1]
  assert choose_members(passed, 2) == [1, 2]
  assert choose_members(passed, 9) == [1, 2, 0, 3]
  assert choose_members(passed.astype(np.float32), 9) == [1, 2, 0, 3]
  assert share_solved(passed[[1, 2]]) == 1.0
  assert share_solved(passed[[3]]) == 0.0


def test_fractions_count_by_what_they_add_to_the_best_so_far():
  values = np.array(
    [
      [0.5, 0.5, 0.5, 0.5],  # 2.0 by itself
      [1.0, 0.75, 0.0, 0.0],  # 1.75, and 0.75 on top of the first
      [0.25, 0.25, 0.75, 0.625],  # 1.875, but only 0.375 on top of the first
      [0.0, 0.0, 0.875, 0.5],  # 1.375, and 0.375 on top of the first
    ]
  )
  assert choose_members(values, 1) == [0]
  # The second one adds 0.75. Then the third adds 0.25 + 0.125 and the fourth 0.375: the third reaches more by itself.
  assert choose_members(values, 3) == [0, 1, 2]
  assert choose_members(values, 4) == [0, 1, 2, 3]
  assert share_solved(values[[0, 1]]) == (1.0 + 0.75 + 0.5 + 0.5) / 4
  assert share_solved(values[[0, 1, 2]]) == (1.0 + 0.75 + 0.75 + 0.625) / 4


def test_of_equals_the_one_that_reaches_more_by_itself_and_then_the_first():
  values = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 1.0, 0.0]])
  assert choose_members(values, 4) == [3, 0, 1, 2]  # the last two add nothing, and reach as much: the first


def test_nan_is_nothing_to_a_member_and_padding_where_it_is_all_there_is():
  values = np.array(
    [
      [1.0, 0.0, NAN, 0.25, NAN],
      [NAN, NAN, NAN, NAN, NAN],  # failed
      [0.0, 0.5, NAN, 1.0, NAN],
    ]
  )
  assert choose_members(values, 3) == [2, 0, 1]
  assert share_solved(values) == (1.0 + 0.5 + 1.0) / 3
  assert share_solved(values[[0, 1]]) == (1.0 + 0.0 + 0.25) / 3


@pytest.mark.parametrize("kind", ["verdicts", "fractions"])
@pytest.mark.parametrize("seed", range(20))
def test_greedy_choice_keeps_its_guarantee(seed, kind):
  drawn = np.random.default_rng(seed).uniform(size=(8, 30))
  values = drawn < 0.2 if kind == "verdicts" else drawn**4
  best = max(share_solved(values[list(members)]) for members in itertools.combinations(range(8), 3))
  chosen = choose_members(values, 3)
  assert len(set(chosen)) == 3
  assert share_solved(values[chosen]) >= (1 - 1 / np.e) * best
  assert choose_members(values, 5)[:3] == chosen  # a smaller swarm is the beginning of a larger one


def test_no_member_is_no_swarm():
  with pytest.raises(ValueError, match="size"):
    choose_members(np.ones((2, 2), bool), 0)
