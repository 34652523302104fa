"""GENOME: how a child is made, against float64 NumPy, and who survives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes.space import dense_space, take
from cqd_jax.search.algorithm import Info
from cqd_jax.search.members import NOBODY
from cqd_jax.search.succession import Rates, Succession, roulette_weights, survivors
from cqd_jax.tasks import Scored

POINTS = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
RATES = {
  "crossover": 1.0,
  "mutation": 0.0,
  "genes": 0.25,
  "sigma": 0.5,
  "step": 0.5,
  "decay": 0.5,
  "own": 0.0,
  "best": 0.0,
  "worst": 0.0,
}


def make(batch_size=6, size=4, **rates):
  space = dense_space({"kernel": jnp.zeros((4, 2))}, {"kernel": jnp.asarray(POINTS)})
  return Succession(space=space, batch_size=batch_size, size=size, rates=Rates(**{**RATES, **rates}))


def scored(means):
  """Values `[P, 2, 3]` of which each individual has the given mean."""
  return Scored(jnp.asarray(np.float32(means))[:, None, None] + jnp.zeros((1, 2, 3)))


def begin(search, means=(0.2, 0.6, 0.1)):
  return search.init(jax.random.key(0), search.space.initial, scored(means))


def children_of(search, means=(0.2, 0.6, 0.1)):
  children, info = jax.jit(search.ask)(begin(search, means), jax.random.key(5))
  return np.float64(children["kernel"]), np.asarray(info.parents), info


def merged(parents, means):
  """The parents' mean weighted by fitness."""
  weights = np.array(means)[parents] / np.array(means)[parents].sum(axis=1, keepdims=True)
  return np.einsum("pi,pi...->p...", weights, np.float64(POINTS)[parents])


@pytest.mark.parametrize(
  ("fitnesses", "weights"),
  [
    ([0.2, -np.inf, 0.6], [0.2, 0.0, 0.6]),
    ([-0.5, 0.5, -np.inf, 0.0], [0.0, 1.0, 0.0, 0.5]),
    ([0.0, -np.inf, 0.0], [1.0, 0.0, 1.0]),
    ([-2.0, -2.0], [1.0, 1.0]),
  ],
)
def test_a_roulette_goes_by_fitness(fitnesses, weights):
  np.testing.assert_allclose(roulette_weights(jnp.array(fitnesses)), weights)


def test_survivors_are_the_best_tenth_and_others_by_chance():
  fitnesses = jnp.array([0.1, 0.9, -jnp.inf, 0.3, 0.0, 0.8, 0.3, 0.2, -jnp.inf, 0.3] * 2)
  draws = jax.vmap(lambda key: survivors(key, fitnesses, 6))(jax.random.split(jax.random.key(0), 200))
  counts = np.bincount(np.asarray(draws).ravel(), minlength=20)
  assert all(len(set(row)) == 6 for row in np.asarray(draws).tolist())
  assert counts[[1, 11]].tolist() == [200, 200]
  assert counts[np.asarray(fitnesses) == -np.inf].sum() == 0
  assert counts[np.asarray(fitnesses) == 0.0].sum() == 0
  assert counts[[5, 15]].min() > counts[[0, 10]].max()  # 0.8 against 0.1: 8 standard deviations apart
  everyone = survivors(jax.random.key(1), fitnesses, 20).tolist()
  assert set(everyone[:14]) == set(np.flatnonzero(np.asarray(fitnesses) > 0).tolist())
  assert set(everyone[16:]) == {2, 8, 12, 18}


def test_a_child_is_a_merge_or_a_copy_and_a_step_along_what_was_learned():
  means, strengths = [0.2, 0.6, 0.1], np.array([0.3, 0.2, 0.4])
  search = make(crossover=0.5, **dict(zip(("own", "best", "worst"), strengths.tolist(), strict=True)))
  children, parents, _ = children_of(search)
  assert (parents[:, 0] != parents[:, 1]).all()
  _, child_key, _ = jax.random.split(jax.random.key(5), 3)
  keys = jax.vmap(lambda key: jax.random.split(key, 3))(jax.random.split(child_key, 6))
  crossed = np.asarray(jax.vmap(lambda key: jax.random.bernoulli(key, 0.5))(keys[:, 0]))
  assert 0 < crossed.sum() < 6
  drawn = strengths * np.float64(jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys[:, 2]))
  shares = (0.5 * drawn / drawn.sum(axis=1, keepdims=True)).T[:, :, None, None]
  child = np.where(crossed[:, None, None], merged(parents, means), POINTS[parents[:, 0]])
  fitter = parents[np.arange(6), np.array(means)[parents].argmax(axis=1)]
  toward = np.stack([POINTS[fitter] - child, POINTS[1] - child, child - POINTS[2]])
  np.testing.assert_allclose(children, child + (shares * toward).sum(axis=0), rtol=1e-4, atol=1e-5)


def test_a_mutation_changes_a_part_of_the_weights():
  search = make(batch_size=64, mutation=1.0, sigma=1e-2)
  children, parents, _ = children_of(search)
  before = merged(parents, [0.2, 0.6, 0.1])
  noise = (children - before) / np.sqrt((before**2).mean(axis=(1, 2), keepdims=True))
  changed = np.abs(noise) > 1e-5
  # 512 entries, of which a quarter: 5 standard deviations are 49. Noise of 1e-2 is below 1e-5 less than once in 1000.
  assert abs(changed.sum() - 128) < 50
  assert abs(noise[changed].std() - 1e-2) < 4e-3


def test_a_batch_is_selected_from_and_remembered():
  search = make(batch_size=3)
  state = begin(search)
  tell = jax.jit(search.tell)
  info = Info(extra={"key": jax.random.key(1)})
  children = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 2)), jnp.float32)}
  after, metrics = tell(state, children, scored([0.9, np.nan, 0.05]), info)
  identities = np.asarray(after.members.identities).tolist()
  assert identities[0] == 3  # the best of all, and three more of the five that succeeded
  assert len(set(identities)) == 4
  assert set(identities) <= {0, 1, 2, 3, 5}
  np.testing.assert_allclose(metrics["best_mean"], 0.9, rtol=1e-6)
  np.testing.assert_array_equal(after.worst["kernel"], children["kernel"][2])
  np.testing.assert_allclose([after.worst_fitness, after.step], [0.05, 0.25])
  population = search.population(after)
  everyone = np.concatenate([POINTS, children["kernel"]])
  np.testing.assert_array_equal(population.genotypes["kernel"], everyone[population.identities])
  # From a batch that failed whole nothing is learned; it only counts.
  failed, _ = tell(after, children, scored([np.nan] * 3), info)
  assert int(failed.asked) == 9
  jax.tree.map(np.testing.assert_array_equal, failed.replace(asked=after.asked), after)


def test_an_expert_that_failed_has_no_part_in_anything():
  search = make()
  state = begin(search, [0.2, np.nan, 0.1])
  assert np.asarray(state.members.identities).tolist() == [0, NOBODY, 2, NOBODY]
  np.testing.assert_array_equal(take(search.population(state).genotypes, 1)["kernel"], POINTS[2])
  with pytest.raises(ValueError, match="no individual of the initial population has finite scores"):
    begin(search, [np.nan] * 3)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"size": 2}, "population_size: expected a place for each of 3 experts, got 2"),
    ({"crossover": 1.5}, r"crossover: expected a number in \[0, 1\], got 1.5"),
    ({"sigma": -1.0}, "sigma: expected at least 0, got -1.0"),
  ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)
