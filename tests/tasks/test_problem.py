"""What all problems have in common: means over the samples that are there, and fingerprints whose parts have names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.tasks import Problem, Sample, Scored, TextProblem, TracedProblem, task_scores
from cqd_jax.tasks.problem import TracedScoring, changed_parts

NAN = float("nan")

# [P, K, B] = [3, 2, 4]: whole, ragged, failed; and what the means are by hand
VALUES = [
  [[1, 0, 1, 1], [0.25, 0.5, 0.75, 0.5]],
  [[1, 0, NAN, NAN], [NAN, -3, NAN, 5]],
  [[NAN] * 4, [NAN] * 4],
]
SCORES = [[0.75, 0.5], [0.5, 1.0], [NAN, NAN]]


def test_the_score_of_a_task_is_the_mean_over_the_samples_that_are_there():
  scores = task_scores(np.array(VALUES, np.float32))
  assert isinstance(scores, np.ndarray)
  assert scores.dtype == np.float64
  np.testing.assert_array_equal(scores, SCORES)


def test_it_is_the_same_traced_but_for_its_precision():
  scores = jax.jit(task_scores)(jnp.array(VALUES, jnp.float32))
  assert scores.dtype == jnp.float32
  np.testing.assert_array_equal(scores, SCORES)
  gradient = jax.grad(lambda values: task_scores(values)[0].sum())(jnp.array(VALUES, jnp.float32))
  np.testing.assert_array_equal(gradient[0], np.full((2, 4), 0.25))
  assert not np.isnan(gradient).any()


def test_numpy_adds_in_float64():
  values = np.full((1, 1, 30_000_001), 1, np.float32)
  values[0, 0, 0] = 0
  assert task_scores(values)[0, 0] == 30_000_000 / 30_000_001


def test_no_samples_are_no_score_and_no_warning():
  np.testing.assert_array_equal(task_scores(np.zeros((2, 3, 0), np.float32)), np.full((2, 3), NAN))
  np.testing.assert_array_equal(task_scores(jnp.zeros((2, 3, 0))), np.full((2, 3), NAN))


def test_scores_are_filled_in_unless_they_are_there():
  values = np.array(VALUES, np.float32)
  scored = Scored(values, 1.5)
  assert scored.scores is None
  np.testing.assert_array_equal(scored.with_scores().scores, SCORES)
  assert scored.with_scores().seconds == 1.5
  own = np.ones((3, 2))
  assert scored._replace(scores=own).with_scores().scores is own


@pytest.mark.parametrize(
  ("before", "now", "changed"),
  [
    ("coding=1 os=2 decoding=3", "coding=1 os=2 decoding=3", []),
    ("coding=1 os=2 decoding=3", "coding=1 os=4 decoding=5", ["decoding", "os"]),
    ("coding=1 decoding=3", "coding=1 os=2 decoding=3", ["os"]),
    ("coding=1 os=2", "coding=1", ["os"]),
    ("", "coding=1", ["coding"]),
    ("decoding=1 decoding=2", "decoding=3 decoding=2", ["decoding"]),  # a task of that name
    ("no parts", "no_parts", ["no", "no_parts", "parts"]),
  ],
)
def test_what_changed_is_named(before, now, changed):
  assert changed_parts(before, now) == changed


def test_both_problems_are_problems_and_one_can_be_traced():
  traced = TracedProblem(lambda params, data: data, {"validation": 0, "test": 0}, task_names=("a",))
  assert isinstance(traced, Problem)
  assert isinstance(traced, TracedScoring)
  text = TextProblem([], _Silent(), lambda jobs: [], max_new_tokens=1)
  assert isinstance(text, Problem)
  assert not isinstance(text, TracedScoring)
  assert not isinstance(object(), Problem)


class _Silent:
  fingerprint = "silent"

  def generate(self, individuals, requests):
    return [["" for _ in own] for own in requests]


def test_a_sample_needs_no_pictures():
  assert Sample("task", "prompt", "gold", "answer", 1.0).pictures == ()
