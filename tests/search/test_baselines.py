"""The baseline searches on a function with a known optimum, and the greedy choice of members against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.search.baselines import cma_es, random_search
from cqd_jax.search.swarm import choose_members, share_solved

OPTIMUM = np.array([0.3, 0.8, -0.2, 0.5], np.float32)


def fitness(candidates):
  return -jnp.square(candidates - OPTIMUM[None]).sum(axis=-1)


def run(search, batches):
  state, best = search.state, -np.inf
  for key in jax.random.split(jax.random.key(0), batches):
    candidates = search.ask(state, key)
    values = fitness(candidates)
    state = search.tell(state, candidates, values)
    best = max(best, float(values.max()))
  return best, candidates


def test_cma_es_finds_the_optimum_of_a_quadratic():
  best, candidates = run(cma_es(jnp.full(4, 0.5), batch_size=8, step_size=0.2), 60)
  assert best > -1e-3
  np.testing.assert_allclose(np.asarray(candidates).mean(axis=0), OPTIMUM, atol=0.05)


def test_cma_es_beats_random_search_at_equal_evaluations():
  by_cma, _ = run(cma_es(jnp.full(4, 0.5), batch_size=8, step_size=0.2), 25)
  by_chance, candidates = run(random_search(4, batch_size=8, low=-1.0, high=1.0), 25)
  assert by_cma > by_chance
  assert (np.abs(np.asarray(candidates)) <= 1).all()


def test_a_failed_candidate_ranks_last():
  search = cma_es(jnp.zeros(2), batch_size=4, step_size=0.1)
  candidates = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
  state = search.tell(search.state, candidates, jnp.array([jnp.nan, 1.0, 0.0, -jnp.inf]))
  # The better half: the second and the third, weighted log(2.5 / 1) and log(2.5 / 2).
  weights = np.log(2.5 / np.array([1.0, 2.0]))
  expected = (weights / weights.sum()) @ np.array([2.0, 3.0])
  np.testing.assert_allclose(state.mean, [expected, expected], rtol=1e-5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: random_search(0, batch_size=1, low=0.0, high=1.0), "dimension"),
    (lambda: random_search(2, batch_size=1, low=1.0, high=1.0), "low, high"),
    (lambda: cma_es(jnp.zeros(2), batch_size=1, step_size=0.1), "batch_size"),
    (lambda: cma_es(jnp.zeros(2), batch_size=4, step_size=0.0), "step_size"),
  ],
)
def test_bad_settings_are_refused_by_name(make, message):
  with pytest.raises(ValueError, match=message):
    make()


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
  assert share_solved(passed[[1, 2]]) == 1.0
  assert share_solved(passed[[3]]) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_greedy_choice_keeps_its_guarantee(seed):
  passed = np.random.default_rng(seed).uniform(size=(8, 30)) < 0.2
  best = max(share_solved(passed[list(members)]) for members in itertools.combinations(range(8), 3))
  chosen = choose_members(passed, 3)
  assert len(set(chosen)) == 3
  assert share_solved(passed[chosen]) >= (1 - 1 / np.e) * best


def test_no_member_is_no_swarm():
  with pytest.raises(ValueError, match="size"):
    choose_members(np.ones((2, 2), bool), 0)
