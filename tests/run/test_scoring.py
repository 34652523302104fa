"""Nobody is scored twice: not in a batch, not in another method or session, and only by questions that are the same."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loop_cases import NAMES, Plain, equal, root_space, traced

from cqd_jax.genotypes.space import coefficients, core, take
from cqd_jax.run.scoring import Clock, Scorer, names_of
from cqd_jax.store.history import History
from cqd_jax.tasks import Scored, task_scores


def keep(rank, make):
  return make()


@contextlib.contextmanager
def session(path, problem, clock=None):
  with History(path / "h.sqlite", NAMES) as history:
    yield Scorer(problem, history, clock or Clock())


def individuals(num, seed=3):
  source = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(source.normal(size=(num, *leaf.shape[1:])), jnp.float32), root_space().initial
  )


def expected(population, space):
  return Plain().score("test", space.as_scored(population), space.scored_in).values


def test_individuals_get_their_values_and_the_history_keeps_them(tmp_path):
  space, population, problem, clock = root_space(), individuals(5), Plain(), Clock()
  with session(tmp_path, problem, clock) as scorer:
    scored = scorer.score("test", population, space)
  assert scored.values.dtype == np.float32
  np.testing.assert_array_equal(scored.values, expected(population, space))
  assert scored.scores.dtype == np.float64
  np.testing.assert_array_equal(scored.scores, scored.values.astype(np.float64).mean(axis=-1))
  assert scored.seconds == pytest.approx(0.25)  # as the problem says
  assert problem.asked == [("test", 5)]
  assert (clock.candidates, clock.samples) == (5, 5 * 2 * 8)
  assert min(clock.score_s, clock.record_s) > 0


def test_of_equal_individuals_in_a_batch_one_is_scored(tmp_path):
  space, problem = root_space(), Plain()
  population = take(individuals(3), np.array([2, 0, 2, 1, 0, 2]))
  with session(tmp_path, problem) as scorer:
    scored = scorer.score("test", population, space)
  assert problem.asked == [("test", 3)]
  np.testing.assert_array_equal(scored.values, expected(population, space))


def test_in_a_later_batch_and_session_only_strangers_are_scored(tmp_path):
  space, first = root_space(), Plain()
  population = individuals(6)
  with session(tmp_path, first) as scorer:
    scorer.score("test", take(population, np.array([4, 1])), space)
    scored = scorer.score("test", take(population, np.array([1, 0, 4])), space)
    assert scored.seconds == pytest.approx(0.25 / 2 + 0.25 + 0.25 / 2)  # what they took when they were scored
  assert first.asked == [("test", 2), ("test", 1)]
  later = Plain()
  with session(tmp_path, later) as scorer:
    scored = scorer.score("test", population, space)
    again = scorer.score("test", population, space)
  assert later.asked == [("test", 3)]
  np.testing.assert_array_equal(scored.values, expected(population, space))
  np.testing.assert_array_equal(again.values, scored.values)


def test_an_individual_is_the_same_whichever_way_it_was_found(tmp_path):
  """Coefficients are scored as what they sum to, so that the experts of every method are scored once."""
  root, problem = root_space(), Plain()
  with session(tmp_path, problem) as scorer:
    own = scorer.score("validation", root.initial, root)
    for granularity in ("model", "layer", "kernel"):
      space = coefficients(root, keep, granularity=granularity)
      equal(scorer.score("validation", space.initial, space).values, own.values)
    assert problem.asked == [("validation", 2)]
    space = coefficients(root, keep, granularity="model")
    scorer.score("validation", jnp.array([[[0.5], [0.25]], [[1.0], [0.0]]]), space)
    assert problem.asked == [("validation", 2), ("validation", 1)]
    equivalent = jax.tree.map(lambda leaf: (0.5 * leaf[0] + 0.25 * leaf[1])[None], root.initial)
    scorer.score("validation", equivalent, root)
    assert len(problem.asked) == 2


def test_cores_are_scored_as_what_they_are_in_their_bases(tmp_path):
  root, problem = root_space(), Plain()
  cores = core(root, keep, rank=0)
  merged = coefficients(root, keep, rank=0, granularity="kernel")
  with session(tmp_path, problem) as scorer:
    scorer.score("test", root.initial, root)
    scored = scorer.score("test", cores.initial, cores)  # their rounding is another
    assert problem.asked == [("test", 2), ("test", 2)]
    np.testing.assert_array_equal(scorer.score("test", merged.initial, merged).values, scored.values)
    assert len(problem.asked) == 2


def test_splits_and_fingerprints_are_told_apart(tmp_path):
  space, population = root_space(), individuals(2)
  first, other = Plain(), Plain(version="2")
  with session(tmp_path, first) as scorer:
    for split in ("test", "validation", "test"):
      scorer.score(split, population, space)
  assert first.asked == [("test", 2), ("validation", 2)]
  with session(tmp_path, other) as scorer:
    scorer.score("test", population, space)
  assert other.asked == [("test", 2)]
  back = Plain()
  with session(tmp_path, back) as scorer:
    scorer.score("test", population, space)
  assert back.asked == []


def test_what_failed_is_remembered_too(tmp_path):
  class Failing(Plain):
    def score(self, split, individuals, space):
      scored = super().score(split, individuals, space)
      scored.values[1] = np.nan
      return scored

  problem, space = Failing(), root_space()
  with session(tmp_path, problem) as scorer:
    for _ in range(2):
      scored = scorer.score("test", individuals(3), space)
      np.testing.assert_array_equal(np.isnan(scored.scores).all(axis=1), [False, True, False])
  assert problem.asked == [("test", 3)]


@pytest.mark.parametrize(
  ("change", "shape"),
  [
    (lambda values: values[:1], r"\(1, 2, 8\)"),
    (lambda values: values[:, :1], r"\(2, 1, 8\)"),
    (lambda values: task_scores(values), r"\(2, 2\)"),
  ],
)
def test_values_of_another_shape_are_refused_and_not_kept(tmp_path, change, shape):
  class Odd(Plain):
    def score(self, split, individuals, space):
      return Scored(change(super().score(split, individuals, space).values))

  message = rf"score: expected values \[2 individuals, 2 tasks, samples\], got shape {shape}"
  with session(tmp_path, Odd()) as scorer:
    for _ in range(2):
      with pytest.raises(ValueError, match=message):
        scorer.score("test", individuals(2), root_space())


def test_a_traced_problem_is_kept_like_any_other(tmp_path):
  space, population = root_space(), individuals(4)
  with session(tmp_path, traced()) as scorer:
    scored = scorer.score("test", population, space)
    assert len(scorer._history.recall("test", traced().fingerprint("test"), names_of(population, space))) == 4
  np.testing.assert_array_equal(scored.values, expected(population, space))


def test_names_are_those_of_bits_shapes_and_spaces():
  space = root_space()
  population = individuals(3)
  names = names_of(population, space)
  assert len(set(names)) == 3
  assert names_of(take(population, np.array([1, 0])), space) == [names[1], names[0]]  # wherever in a batch

  def changed(change):
    return names_of(jax.tree.map(change, population), space)

  assert not set(changed(lambda leaf: leaf.at[(1, *[0] * (leaf.ndim - 1))].add(1e-6))) & {names[1]}
  assert changed(lambda leaf: leaf.at[(1, *[0] * (leaf.ndim - 1))].add(1e-6))[0] == names[0]
  assert not set(changed(lambda leaf: leaf.astype(jnp.bfloat16))) & set(names)
  zeros = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:])), population)
  assert names_of(zeros, space) != names_of(jax.tree.map(jnp.negative, zeros), space)
  flat = {
    "Dense_0": {"kernel": population["Dense_0"]["kernel"].reshape(3, 4, 6), "bias": population["Dense_0"]["bias"]}
  }
  assert not set(names_of(flat, space)) & set(names)
  renamed = {"Dense_1": population["Dense_0"]}
  assert not set(names_of(renamed, space)) & set(names)
  assert all(len(name) == 32 for name in names)


def test_no_individuals_are_too_few_to_be_scored_twice(tmp_path):
  """A batch whose individuals are all known asks nobody."""
  space, problem = root_space(), Plain()
  with session(tmp_path, problem) as scorer:
    scorer.score("test", individuals(1), space)
    scorer.score("test", take(individuals(1), np.array([0, 0, 0])), space)
  assert problem.asked == [("test", 1)]
