"""What is said of individuals in a few words."""

import dataclasses

import numpy as np
import pytest

from cqd_jax.store.individuals import Individuals


def noted(*notes):
  size = len(notes)
  return Individuals(
    born=np.arange(size),
    archive=np.full(size, -1),
    parents=np.full((size, 2), -1),
    notes=notes,
    mutation=[""] * size,
    scores=np.zeros((size, 3)),
    taken=np.zeros((size, 3), bool),
    seconds=np.zeros(size),
  )


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.123456, "0.123"),
    (-1.0, "-1"),
    (12345.678, "1.23e+04"),
    (123456, "123456"),
    (True, "yes"),
    (False, "no"),
    (None, "not finite"),
    ("svd 2", "svd 2"),
    ("", ""),
    ("a\n  b", "a b"),
    ("x" * 100, "x" * 79 + "\u2026"),
    ([], "none"),
    ([0.5], "0.5"),
    ([1, 2, 6.0], "3 on average, 1 to 6 over 3"),
    ([[0.25, 0.5], [0.75, None]], "0.5 on average, 0.25 to 0.75 over 4"),
    ([None, None], "not finite"),
    (["a", "b", 0.12345], "a, b, 0.123"),
    (["x" * 50, "y" * 50], "x" * 50 + ", " + "y" * 27 + "\u2026"),
    ({"a": [1, 2, 6], "b": {"c": "d"}}, "a: 3 on average, 1 to 6 over 3; b: c: d"),
    ([[1], ["a"]], "1, a"),
  ],
)
def test_a_note_is_a_few_words(value, text):
  assert noted({}, {"one": value}).remarks(1) == [("one", text)]


def test_merge_weights_are_no_remark_unless_they_are_no_such():
  individuals = noted({"weights": [[0.4], [0.6]], "b": 1, "a": 2}, {"weights": [1, 2, 3]}, {})
  assert individuals.remarks(0) == [("b", "1"), ("a", "2")]
  np.testing.assert_array_equal(individuals.weights(0), [[0.4], [0.6]])
  assert individuals.remarks(1) == [("weights", "2 on average, 1 to 3 over 3")]
  assert individuals.weights(1) is None
  assert individuals.remarks(2) == []


@pytest.mark.parametrize("odd", ["text", None, 0.5, [[1, 2], [3]], [["a"], ["b"]], [[], []], [[1], [2], [3]], {"a": 1}])
def test_what_is_no_pair_of_weights_is_none(odd):
  assert noted({"weights": odd}).weights(0) is None


def test_ancestors_have_no_duplicates():
  parents = np.array([[-1, -1], [-1, -1], [0, 1], [2, 2], [1, 0], [3, 2]])
  individuals = dataclasses.replace(noted(*[{}] * 6), parents=parents)
  assert individuals.ancestors(5) == [0, 1, 2, 3, 5]
  assert individuals.ancestors(0) == [0]
