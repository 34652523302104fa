"""Dominated Novelty Search: the score against float64 NumPy, and an archive of models by what they solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.config.plugs import Plug, resolve
from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.space import core_space, dense_space
from cqd_jax.search.algorithm import SearchContext
from cqd_jax.search.dominated_novelty import dominated_novelty
from cqd_jax.tasks import Scored

POINTS = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)


def keep(rank, make):
  return make()


def make(in_core=False, num_experts=2, **settings):
  root = dense_space({"kernel": jnp.zeros((4, 2))}, {"kernel": jnp.asarray(POINTS[:num_experts])})
  if in_core:
    root = core_space(CoreBasis.from_experts(root.base, root.experts))
  return resolve("methods", Plug("dns", settings), "dns")(SearchContext(root, keep, ("a", "b"), 40))


def by_hand(fitnesses, descriptors, neighbors):
  found = []
  for one, fitness in enumerate(fitnesses):
    fitter = [o for o, f in enumerate(fitnesses) if f > fitness or (f == fitness and o < one)]
    distances = sorted(np.linalg.norm(descriptors[one] - descriptors[other]) for other in fitter)[:neighbors]
    found.append(-np.inf if fitness == -np.inf else np.mean(distances) if distances else np.inf)
  return found


def test_novelty_is_the_mean_distance_to_the_nearest_of_the_fitter():
  fitnesses = np.array([0.5, 0.9, 0.2, 0.9, -np.inf, 0.5])
  descriptors = np.array([[0.0, 0], [3, 4], [6, 8], [3, 4], [1, 1], [0, 0]])
  expected = [5.0, np.inf, (5 + 5) / 2, 0.0, -np.inf, (0 + 5) / 2]  # copies of the second and of the first come later
  found = dominated_novelty(jnp.asarray(fitnesses, jnp.float32), jnp.asarray(descriptors, jnp.float32), 2)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(by_hand(fitnesses, descriptors, 2), expected)


@pytest.mark.parametrize("neighbors", [1, 3, 50])
def test_novelty_is_that_of_numpy(neighbors):
  source = np.random.default_rng(1)
  fitnesses = source.integers(0, 5, 20) / 4  # with equals
  descriptors = source.integers(0, 2, (20, 12)).astype(float)
  found = dominated_novelty(jnp.asarray(fitnesses, jnp.float32), jnp.asarray(descriptors, jnp.float32), neighbors)
  np.testing.assert_allclose(found, by_hand(fitnesses, descriptors, neighbors), rtol=1e-5)


def values_of(rows):
  """Values `[P, 2, 2]`; the second task has one sample, so that its second is padding."""
  rows = np.float32(rows)
  return jnp.asarray(np.stack([rows[:, :2], np.stack([rows[:, 2], rows[:, 2] + np.nan], axis=1)], axis=1))


def begin(search, rows=((1, 0, 0), (0, 0, 1))):
  return search.init(jax.random.key(0), search.space.initial, Scored(values_of(rows)))


def test_who_is_worse_and_alike_leaves():
  search = make(batch_size=3, population_size=3, neighbors=1)
  ask, tell = jax.jit(search.ask), jax.jit(search.tell)
  state = begin(search)  # means 0.25 and 0.5
  children, info = ask(state, jax.random.key(1))
  assert {frozenset(pair) for pair in np.asarray(info.parents).tolist()} == {frozenset({0, 1})}
  assert set(info.note) == {"weights"}
  nan = np.nan
  state, metrics = tell(state, children, Scored(values_of([[1, 1, 1], [0, 1, 0], [nan, nan, nan]])), info)
  assert search.population(state).identities.tolist() == [0, 1, 2]  # 1, 2 and of the equals 0 and 3 the first
  # Distances to the nearest fitter one: 0 to 1, sqrt(2); 1 to 2, sqrt(2); 3 to 0 and to 1, sqrt(2): a tie of three.
  assert (float(metrics["best_mean"]), int(metrics["num_elites"])) == (1.0, 3)
  children, info = ask(state, jax.random.key(2))
  after, _ = tell(state, children, Scored(values_of([[1, 1, 1], [1, 1, 0], [1, 0, 1]])), info)
  # A copy of the best has novelty 0; 6 and 7 are 1 away from it, 0 then is 1 away from 6, 1 is 1 away from 7.
  assert search.population(after).identities.tolist() == [0, 1, 2]
  failed, _ = tell(after, children, Scored(values_of([[nan] * 3] * 3)), info)
  assert int(failed.asked) == int(after.asked) + 3
  jax.tree.map(np.testing.assert_array_equal, failed.replace(asked=after.asked), after)


def test_fitness_may_be_one_task_after_another():
  search = make(batch_size=2, population_size=2, neighbors=1, rotating=True, crossover="linear", mutation="none")
  ask, tell = jax.jit(search.ask), jax.jit(search.tell)
  state = begin(search)
  children, info = ask(state, jax.random.key(1))
  state, _ = tell(state, children, Scored(values_of([[1, 1, 0], [1, 1, 0]])), info)
  # The first task: the third is the best, the fourth its copy, the others sqrt(2) or more away from who is fitter.
  assert search.population(state).identities.tolist() == [1, 2]
  assert int(state.iteration) == 1
  children, info = ask(state, jax.random.key(2))
  state, _ = tell(state, children, Scored(values_of([[0, 0, 1], [1, 1, 1]])), info)
  # The second task: 1 is the first of the best; 4 is its copy; 5 is sqrt(2) away from it, and 2 is 1 away from 5.
  assert search.population(state).identities.tolist() == [1, 5]


def test_defaults_and_refusals_are_those_of_cycleqd():
  assert make().variation == "expert_svd 0.3"
  assert make(num_experts=1).variation == "svd 2"
  assert make(genotype="coefficients").variation == "iso 0.15, line 0.3"
  assert make(in_core=True, genotype="core").variation == "expert_svd 0.3"
  with pytest.raises(ValueError, match=r"crossover ties_crossover: elementwise, .* core"):
    make(in_core=True, genotype="core", crossover="ties")
  with pytest.raises(ValueError, match="population_size: expected a place for each of 2 initial individuals, got 1"):
    make(population_size=1)
  with pytest.raises(ValueError, match="neighbors: expected at least 1, got 0"):
    make(neighbors=0)
  with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
    make(batch_size=0)
  with pytest.raises(ValueError, match="no individual of the initial population has finite scores"):
    begin(make(), [[np.nan] * 3] * 2)
