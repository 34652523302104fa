"""Model Swarms: one step against float64 NumPy, where particles begin, restart and stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes.space import dense_space
from cqd_jax.search.members import NOBODY
from cqd_jax.search.particle_swarm import ParticleSwarm, Pull, swarm_shares
from cqd_jax.tasks import Scored

SETTINGS = {"num_particles": 5, "pull": Pull(), "step": 0.8, "decay": 0.5, "least_step": 0.3, "restart_after": 2}
POINTS = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)


def make(experts=POINTS, **settings):
  base = {"kernel": jnp.zeros(experts.shape[1:])}
  return ParticleSwarm(space=dense_space(base, {"kernel": jnp.asarray(experts)}), **{**SETTINGS, **settings})


SWARM = make()
ASK, TELL = jax.jit(SWARM.ask), jax.jit(SWARM.tell)


def scored(means):
  """Values `[P, 2, 3]` of which each individual has the given mean."""
  return Scored(jnp.asarray(np.float32(means))[:, None, None] + jnp.zeros((1, 2, 3)))


def begin(means=(0.2, 0.5, 0.1)):
  return SWARM.init(jax.random.key(4), SWARM.space.initial, scored(means))


def kernels(tree):
  return np.float64(tree["kernel"])


def step(state, means, seed=1):
  children, info = ASK(state, jax.random.key(seed))
  return TELL(state, children, scored(means), info)[0], children, info


def test_shares_are_strengths_times_random_numbers_made_to_sum_to_one():
  shares = np.asarray(swarm_shares(jax.random.key(0), jnp.array([0.4, 0.3, 0.0, 0.3]), 7))
  drawn = np.float64(jax.random.uniform(jax.random.key(0), (4, 7))) * np.array([0.4, 0.3, 0.0, 0.3])[:, None]
  np.testing.assert_allclose(shares, drawn / drawn.sum(axis=0), rtol=1e-5)


def test_it_begins_with_the_experts_and_places_others_between_two_of_them():
  state = begin()
  np.testing.assert_array_equal(state.positions["kernel"][:3], POINTS)
  for place in range(3):  # each in the direction of another
    ways = [other for other in range(3) if other != place]
    velocity = np.asarray(state.velocities["kernel"][place])
    assert any(np.allclose(velocity, POINTS[other] - POINTS[place]) for other in ways)
  children, info = ASK(state, jax.random.key(1))
  parents = np.asarray(info.parents)
  np.testing.assert_array_equal(parents[:3], [[0, 1], [1, 1], [2, 1]])  # its own best, and the best of all
  for place in (3, 4):
    first, second = (np.float64(POINTS[parent]) for parent in parents[place])
    assert parents[place, 0] != parents[place, 1]
    along = (kernels(children)[place] - second) / (first - second)
    np.testing.assert_allclose(along, along[0, 0], rtol=1e-3)
    assert 0 <= along[0, 0] <= 1
    velocity = np.asarray(info.extra["velocities"]["kernel"][place])
    assert any(np.allclose(velocity, POINTS[other] - np.asarray(children["kernel"][place])) for other in range(3))


def test_a_step_is_the_papers():
  state, _, _ = step(begin(), [0.6, 0.3, 0.0, 0.4, 0.2])
  state, _, _ = step(state, [0.1, 0.7, 0.05, 0.3, 0.25], seed=2)
  assert np.asarray(state.stale).tolist() == [1, 0, 2, 1, 0]
  np.testing.assert_array_equal(state.bests.identities, [3, 9, 2, 6, 12])
  np.testing.assert_allclose(state.bests.fitnesses, [0.6, 0.7, 0.1, 0.4, 0.25], rtol=1e-6)
  np.testing.assert_allclose([state.worst_fitness, state.step], [0.0, 0.3], atol=1e-6)

  children, info = ASK(state, jax.random.key(3))
  _, move_key = jax.random.split(jax.random.key(3))
  shares = np.float64(swarm_shares(move_key, jnp.array([0.4, 0.3, 0.3, 0.3]), 5))[:, :, None, None]
  here, going, own = (kernels(tree).copy() for tree in (state.positions, state.velocities, state.bests.genotypes))
  here[2], going[2] = own[2], 0.0  # the third has found nothing better for two iterations
  pulls = np.stack([going, own - here, own[1] - here, here - kernels(state.worst)])
  going = (shares * pulls).sum(axis=0)
  np.testing.assert_allclose(info.extra["velocities"]["kernel"], going, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(children["kernel"], here + 0.3 * going, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(info.parents, [[3, 9], [9, 9], [2, 9], [6, 9], [12, 9]])
  np.testing.assert_array_equal(SWARM.population(state).identities, [3, 9, 2, 6, 12])


def test_who_failed_stays_and_who_never_had_a_score_is_placed_again():
  state, first, _ = step(begin(), [0.6, np.nan, 0.2, np.nan, 0.3])
  np.testing.assert_array_equal(state.positions["kernel"][1], POINTS[1])
  np.testing.assert_array_equal(state.positions["kernel"][0], first["kernel"][0])
  np.testing.assert_array_equal(state.bests.identities, [3, 1, 5, NOBODY, 7])
  assert float(state.worst_fitness) == np.float32(0.1)  # and not that of who failed
  assert SWARM.population(state).identities.tolist() == [3, 1, 5, 7]
  children, info = ASK(state, jax.random.key(7))
  parents = np.asarray(info.parents[3])
  where = {3: first["kernel"][0], 1: POINTS[1], 5: first["kernel"][2], 7: first["kernel"][4]}
  one, other = (np.float64(where[parent]) for parent in parents.tolist())
  along = (kernels(children)[3] - other) / (one - other)
  np.testing.assert_allclose(along, along[0, 0], rtol=1e-3)
  # From a batch that failed whole nothing is learned; it only counts.
  after, _, _ = step(state, [np.nan] * 5)
  assert int(after.asked) == int(state.asked) + 5
  jax.tree.map(np.testing.assert_array_equal, after.replace(asked=state.asked), state)


def test_an_expert_that_failed_is_placed_as_others_are():
  broken = POINTS.copy()
  broken[1] = np.nan
  swarm = make(broken)
  state = swarm.init(jax.random.key(4), swarm.space.initial, scored([0.2, np.nan, 0.1]))
  children, info = ASK(state, jax.random.key(1))
  assert np.isfinite(children["kernel"]).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(info.extra))
  assert set(np.asarray(info.parents[1]).tolist()) == {0, 2}


def test_a_swarm_of_half_precision_stays_one():
  swarm = make(POINTS.astype(jnp.bfloat16))
  state = swarm.init(jax.random.key(4), swarm.space.initial, scored([0.2, 0.5, 0.1]))
  children, info = jax.eval_shape(swarm.ask, state, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves((children, info.extra))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"experts": POINTS[:1]}, "experts: a swarm moves between at least 2, got 1"),
    ({"num_particles": 2}, "batch_size: expected a particle for each of 3 experts, got 2"),
    ({"decay": 0.0}, "decay"),
    ({"least_step": 2.0}, "least_step"),
    ({"restart_after": -1}, "restart_after: expected at least 0, got -1"),
  ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


def test_pulls_are_numbers_of_at_least_zero():
  with pytest.raises(ValueError, match="inertia, own, best, worst: expected numbers of at least 0"):
    Pull(own=-0.1)
  with pytest.raises(ValueError, match="one of them above 0"):
    Pull(0.0, 0.0, 0.0, 0.0)
  with pytest.raises(ValueError, match="no individual of the initial population has finite scores"):
    begin([np.nan] * 3)
