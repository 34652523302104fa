"""LoraHub's price and bounds, and restarts, around CMA-ES."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.search.cma_variants import REACH, with_restarts, within_bounds
from cqd_jax.search.vector_search import cma_es

pytestmark = pytest.mark.usefixtures("qdax_ranks")

START = np.array([0.5, 0.4, 0.6], np.float32)
PLAIN = cma_es(jnp.asarray(START), batch_size=6, step_size=0.2)


def scores_of(candidates):
  candidates = np.asarray(candidates, np.float64)
  return np.stack([-(candidates**2).sum(1), candidates.sum(1)], axis=1).astype(np.float32)


def equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_price_is_off_the_scores_that_are_learned_from():
  search = within_bounds(PLAIN, penalty=0.05, bound=0.6)
  candidates = search.ask(search.state, jax.random.key(0))
  beyond = np.asarray(PLAIN.ask(PLAIN.state, jax.random.key(0)))
  assert (np.abs(beyond) > 0.6).any()
  np.testing.assert_array_equal(candidates, np.clip(beyond, -0.6, 0.6))
  # All score alike: the order is that of the price, the smallest first.
  learned = search.tell(search.state, candidates, jnp.full((6, 2), 0.3))
  ranked = np.argsort(np.abs(np.float64(candidates)).mean(axis=1))[:3]
  weights = np.log(3.5 / np.array([1.0, 2.0, 3.0]))
  np.testing.assert_allclose(learned.mean, weights @ np.float64(candidates)[ranked] / weights.sum(), rtol=1e-5)
  # One that failed is last, however small; from a batch that failed whole nothing is learned.
  scores = np.full((6, 2), 0.3, np.float32)
  scores[ranked[0]] = np.nan
  learned = search.tell(search.state, candidates, jnp.asarray(scores))
  ranked = np.argsort(np.abs(np.float64(candidates)).mean(axis=1))[1:4]
  np.testing.assert_allclose(learned.mean, weights @ np.float64(candidates)[ranked] / weights.sum(), rtol=1e-5)
  equal(search.tell(search.state, candidates, jnp.full((6, 2), jnp.nan)), search.state)


def test_settings_out_of_range_are_refused():
  with pytest.raises(ValueError, match="penalty: expected at least 0, got -1"):
    within_bounds(PLAIN, penalty=-1.0, bound=1.0)
  with pytest.raises(ValueError, match="bound: expected more than 0, got 0"):
    within_bounds(PLAIN, penalty=0.0, bound=0.0)


def test_until_it_has_ended_a_search_with_restarts_is_the_search_without():
  search, state, plain = with_restarts(PLAIN), with_restarts(PLAIN).state, PLAIN.state
  for turn in range(3):
    candidates = search.ask(state, jax.random.key(turn))
    scores = jnp.asarray(scores_of(candidates))
    state, plain = search.tell(state, candidates, scores), PLAIN.tell(plain, candidates, scores)
    equal(state.search, plain)
  assert int(state.num_restarts) == 0


def test_where_it_has_ended_it_begins_again_elsewhere():
  search = with_restarts(PLAIN)
  candidates = search.ask(search.state, jax.random.key(0))
  varied, flat = jnp.asarray(scores_of(candidates)), jnp.full((6, 2), 0.5)
  learned = search.tell(search.state, candidates, varied)
  small = search.state.replace(search=PLAIN.state.replace(sigma=jnp.float32(1e-3)))
  ends = {
    "flat": search.tell(learned, candidates, flat),
    "flat, as far as it is known": search.tell(learned, candidates, flat.at[3:].set(jnp.nan)),
    "tiny": search.tell(small, START[None] + (candidates - START[None]) / 200, varied),
    "broken": search.tell(
      learned.replace(search=learned.search.replace(cov_matrix=jnp.full((3, 3), jnp.nan))), candidates, varied
    ),
  }
  for end in ends.values():
    assert int(end.num_restarts) == 1
    offset = np.asarray(end.search.mean) - START
    assert (np.abs(offset) <= REACH * 0.2).all()
    assert np.abs(offset).max() > 1e-3
    equal(end.search.replace(mean=PLAIN.state.mean), PLAIN.state)
  again = search.tell(ends["flat"], candidates, flat)
  assert int(again.num_restarts) == 2
  assert (np.asarray(again.search.mean) != np.asarray(ends["flat"].search.mean)).all()  # another place
  # One score says nothing of differences, and none says nothing at all.
  assert int(search.tell(learned, candidates, flat.at[1:].set(jnp.nan)).num_restarts) == 0
  equal(search.tell(learned, candidates, flat + jnp.nan), learned)
