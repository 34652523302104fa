"""The baseline searches on functions with known optima, NSGA-II against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.utils.pareto_front import compute_pareto_front

from cqd_jax.search.vector_search import (
  cma_es,
  crowding_distances,
  front_ranks,
  nsga2,
  polynomial_mutation,
  random_search,
  sbx_crossover,
)

OPTIMUM = np.array([0.3, 0.8, -0.2, 0.5], np.float32)


def fitness(candidates):
  """Two tasks whose mean is highest at the optimum."""
  distance = jnp.square(candidates - OPTIMUM[None]).sum(axis=-1)
  return jnp.stack([-2 * distance + candidates[:, 0], -candidates[:, 0]], axis=-1)


def run(search, batches):
  state, best = search.state, -np.inf
  for key in jax.random.split(jax.random.key(0), batches):
    candidates = search.ask(state, key)
    values = fitness(candidates)
    state = search.tell(state, candidates, values)
    best = max(best, float(values.mean(axis=-1).max()))
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
  state = search.tell(search.state, candidates, jnp.array([[9.0, jnp.nan], [0.0, 2.0], [1.0, -1.0], [9.0, -jnp.inf]]))
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
    (lambda: small_nsga2(dimension=0), "dimension"),
    (lambda: small_nsga2(num_tasks=0), "num_tasks"),
    (lambda: small_nsga2(population_size=1), "population_size"),
    (lambda: small_nsga2(low=1.0), "low, high"),
    (lambda: small_nsga2().tell(small_nsga2().state, jnp.zeros((4, 6)), jnp.zeros(4)), "scores"),
    (lambda: small_nsga2().tell(small_nsga2().state, jnp.zeros((4, 6)), jnp.zeros((4, 2))), "scores"),
  ],
)
def test_bad_settings_are_refused_by_name(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def small_nsga2(dimension=6, **settings):
  return nsga2(
    dimension, **{"batch_size": 8, "num_tasks": 3, "population_size": 20, "low": 0.0, "high": 1.0} | settings
  )


def sort_by_definition(scores):
  """Fronts by taking away, again and again, everyone whom nobody left dominates."""
  scores = np.asarray(scores, np.float64)
  ranks, left, front = np.full(len(scores), len(scores)), set(range(len(scores))), 0
  while left:
    best = {
      i for i in left if not any((scores[j] >= scores[i]).all() and (scores[j] > scores[i]).any() for j in left - {i})
    }
    ranks[list(best)] = front
    left, front = left - best, front + 1
  return ranks


def crowding_by_definition(scores, ranks):
  """Deb et al. 2002, the procedure crowding-distance-assignment, front by front and objective by objective."""
  scores = np.asarray(scores, np.float64)
  distances = np.zeros(len(scores))
  for front in set(ranks.tolist()):
    members = np.flatnonzero(ranks == front)
    for values in scores[members].T:
      order = np.argsort(values, kind="stable")
      spread = values.max() - values.min()
      if spread == 0:
        continue
      distances[members[order[[0, -1]]]] = np.inf
      for place in range(1, len(order) - 1):
        distances[members[order[place]]] += (values[order[place + 1]] - values[order[place - 1]]) / spread
  return distances


def random_scores(seed, size, tasks):
  """Continuous scores for even seeds; for odd ones many ties and equal rows, as shares of a few questions have."""
  drawn = np.random.default_rng(seed).uniform(size=(size, tasks))
  return (np.floor(drawn * 4) / 4 if seed % 2 else drawn).astype(np.float32)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
def test_fronts_and_crowding_follow_the_definitions(tasks):
  sort, measure = jax.jit(front_ranks), jax.jit(crowding_distances)
  for seed in range(6):
    scores = random_scores(seed, 24, tasks)
    ranks = sort(scores)
    np.testing.assert_array_equal(ranks, sort_by_definition(scores))
    # Sums of at most four ratios of float32 numbers, each within a few units of 2**-24.
    np.testing.assert_allclose(measure(scores, ranks), crowding_by_definition(scores, np.asarray(ranks)), atol=2e-6)


def test_the_first_front_is_that_of_qdax(qdax_ranks):
  for seed in range(4):
    scores = jnp.asarray(random_scores(seed, 24, 3))
    np.testing.assert_array_equal(front_ranks(scores) == 0, compute_pareto_front(scores))


def test_crowding_by_hand():
  # One front of four: ends at inf, inside (3 - 0) / 4 + (9 - 5) / 9 and (4 - 1) / 4 + (8 - 0) / 9; the last is alone.
  scores = jnp.array([[0.0, 9.0], [1.0, 8.0], [3.0, 5.0], [4.0, 0.0], [0.0, 0.0]])
  expected = [np.inf, 3 / 4 + 4 / 9, 3 / 4 + 8 / 9, np.inf, 0.0]
  np.testing.assert_allclose(crowding_distances(scores, front_ranks(scores)), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_by_rank_and_then_crowding_survive(seed):
  search = small_nsga2(dimension=1)
  state, everyone = search.state, np.zeros((0, 3), np.float32)
  for batch in range(6):
    scores = random_scores(10 * batch + seed, 8, 3)
    names = jnp.arange(8 * batch, 8 * batch + 8, dtype=jnp.float32)[:, None]
    candidates = np.concatenate([np.asarray(state.candidates)[: len(everyone)], np.asarray(names)])[:, 0].astype(int)
    everyone = np.concatenate([everyone, scores])
    ranks = sort_by_definition(everyone)
    crowding = crowding_by_definition(everyone, ranks)
    state = search.tell(state, names, scores)
    size = min(20, len(everyone))
    kept = [candidates.tolist().index(name) for name in np.asarray(state.candidates)[:size, 0].astype(int)]
    assert len(set(kept)) == size
    np.testing.assert_array_equal(state.scores[:size], everyone[kept])
    out = np.setdiff1d(np.arange(len(everyone)), kept)
    if out.size:
      last = ranks[kept].max()
      assert ranks[out].min() >= last
      lost = out[ranks[out] == last]
      # Two distances may be equal but for rounding.
      assert not lost.size or crowding[lost].max() <= crowding[kept][ranks[kept] == last].min() + 2e-6
    everyone = np.asarray(state.scores)[:size]


def test_a_full_front_keeps_the_dominated_out():
  # The front fills the population exactly; here NSGA2Repertoire of QDax 0.5 keeps (0.5, 0.5) and drops (1, 2).
  search = small_nsga2(dimension=1, num_tasks=2, population_size=4)
  front = jnp.array([[0.0, 3.0], [1.0, 2.0], [2.0, 1.0], [3.0, 0.0]])
  state = search.tell(search.state, jnp.zeros((4, 1)), front)
  state = search.tell(state, jnp.ones((2, 1)), jnp.array([[0.5, 0.5], [0.1, 0.1]]))
  assert sorted(np.asarray(state.scores).tolist()) == np.asarray(front).tolist()
  np.testing.assert_array_equal(state.candidates, np.zeros((4, 1)))


def test_what_failed_never_enters_the_population():
  search = small_nsga2(num_tasks=2, population_size=4)
  failed = jnp.array([[jnp.nan, 9.0], [jnp.inf, 9.0], [9.0, -jnp.inf], [jnp.nan, jnp.nan]])
  mixed = jnp.concatenate([failed, jnp.array([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]])])
  marked = jnp.where(jnp.isfinite(mixed).all(axis=-1, keepdims=True), 0.25, 0.75) * jnp.ones((1, 6))
  state = search.tell(search.state, marked, mixed)
  assert sorted(np.asarray(state.scores).tolist()) == [[-np.inf, -np.inf], [0.0, 0.0], [1.0, 2.0], [2.0, 1.0]]
  np.testing.assert_array_equal(state.candidates, np.array([0.25, 0.25, 0.25, 0.0])[:, None] * np.ones(6))
  # With a place empty, candidates are still random: none has a variable of anyone in the population.
  assert not np.isin(search.ask(state, jax.random.key(1)), state.candidates).any()
  # The worst of those who did not fail has the last place until someone better comes.
  state = search.tell(state, 0.5 * jnp.ones((1, 6)), jnp.array([[3.0, 3.0]]))
  assert sorted(np.asarray(state.scores).tolist()) == [[0.0, 0.0], [1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]
  again = search.tell(state, 0.75 * jnp.ones((4, 6)), failed)
  assert sorted(np.asarray(again.scores).tolist()) == sorted(np.asarray(state.scores).tolist())
  assert np.isin(search.ask(again, jax.random.key(1)), state.candidates).any()


def largest_difference(sample, cdf):
  """The largest difference between the sample's distribution and a continuous one."""
  sample = np.sort(np.asarray(sample, np.float64))
  steps = np.arange(len(sample) + 1) / len(sample)
  return max(np.abs(steps[1:] - cdf(sample)).max(), np.abs(steps[:-1] - cdf(sample)).max())


# Dvoretzky-Kiefer-Wolfowitz: for a right sampler the difference exceeds 0.06 in 4000 draws with probability
# 2 exp(-2 * 4000 * 0.06**2) = 6e-13. Draws are counted after the choice of variables, hence the number asked for.
BOUND, DRAWS = 0.06, 4000


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_mutation_has_the_polynomial_distribution_and_leaves_the_bounds(at):
  mutate = jax.jit(jax.vmap(lambda key: polynomial_mutation(key, jnp.full(1, 2 * at - 1), low=-1.0, high=1.0)))
  moved = (np.asarray(mutate(jax.random.split(jax.random.key(3), 2 * DRAWS)))[:, 0] + 1) / 2
  assert ((moved >= 0) & (moved <= 1)).all()
  # Half the draws go down and half up, each as 1 - (1 - distance)**21 cut off at the bound.
  for distances, room in ((at - moved[moved < at], at), (moved[moved > at] - at, 1 - at)):
    if room:
      assert len(distances) > 0.9 * DRAWS
      within = 1 - (1 - room) ** 21
      assert largest_difference(distances, lambda d, within=within: (1 - (1 - d) ** 21) / within) < BOUND
    else:
      assert not len(distances)


def test_mutation_moves_one_variable_in_the_mean():
  mutate = jax.jit(jax.vmap(lambda key: polynomial_mutation(key, jnp.full(5, 0.5), low=0.0, high=1.0)))
  moved = np.asarray(mutate(jax.random.split(jax.random.key(4), DRAWS))) != 0.5
  # Hoeffding on 4000 sums within [0, 5]: beyond 0.35 with probability 2 exp(-2 * 4000 * 0.35**2 / 25) = 2e-17.
  assert abs(moved.sum(axis=1).mean() - 1) < 0.35


def test_crossover_spreads_children_as_sbx_does():
  # Far from the bounds the spread factor has the density of Deb & Agrawal 1995: 1/2 beta**21 up to 1, then the rest.
  cross = jax.jit(
    jax.vmap(lambda key: sbx_crossover(key, jnp.full(1, 0.4), jnp.full(1, 0.6), low=-1e3, high=1e3), in_axes=0)
  )
  children = np.asarray(cross(jax.random.split(jax.random.key(5), 3 * DRAWS)), np.float64)[:, 0]
  crossed = children[children != np.float32(0.4)]
  # Of all, 0.9 * 1/2 are crossed; Hoeffding: off by 0.04 in 12000 draws with probability 2 exp(-38).
  assert abs(len(crossed) / len(children) - 0.45) < 0.04
  factors = np.abs(crossed - 0.5) / 0.1
  assert largest_difference(factors, lambda b: np.where(b <= 1, b**21 / 2, 1 - np.maximum(b, 1.0) ** -21 / 2)) < BOUND
  assert abs((crossed > 0.5).mean() - 0.5) < BOUND


def test_crossover_stays_in_the_box_and_keeps_what_the_parents_share():
  first = jnp.array([0.1, 0.7, 0.3, 0.3, 0.1, 0.1])
  second = jnp.array([0.7, 0.1, 0.3, 0.30000004, 0.1, 0.100001])
  cross = jax.jit(jax.vmap(lambda key: sbx_crossover(key, first, second, low=0.1, high=0.7)))
  children = np.asarray(cross(jax.random.split(jax.random.key(6), 2000)))
  assert ((children >= np.float32(0.1)) & (children <= np.float32(0.7))).all()
  np.testing.assert_array_equal(children[:, [2, 4]], np.asarray(first)[[2, 4]] * np.ones((2000, 1), np.float32))
  assert len(np.unique(children[:, 0])) > 100


CORNERS = np.eye(3, 6, dtype=np.float32)


def nearness(candidates):
  """Three tasks, each best at a corner of its own: minus the distance to it."""
  return -jnp.sqrt(jnp.square(candidates[:, None] - CORNERS[None]).sum(axis=-1))


def play(search, keys, state):
  """Asks and tells, a batch a key; all candidates and the last state."""
  asked = []
  for key in keys:
    asked.append(np.asarray(search.ask(state, key)))
    state = search.tell(state, asked[-1], nearness(asked[-1]))
  return np.concatenate(asked), state


def dominated_share(scores):
  """Hypervolume above (-2, -2, -2), as the share of fixed points of the cube up to 0 that someone is as good as."""
  points = np.random.default_rng(0).uniform(-2, 0, size=(4000, 3))
  return (np.asarray(scores)[None] >= points[:, None]).all(axis=-1).any(axis=-1).mean()


def test_the_front_of_nsga2_beats_random_search_at_equal_evaluations():
  # The front is the triangle of the corners, where the last three variables are 0: a set of no volume, which random
  # draws miss. The 20 in the population stand against all 160 random ones. The smallest of the five margins is 0.037;
  # the shares are of the same 4000 points, so the standard error of a margin is about sqrt(0.1 / 4000) = 0.005.
  uniform = random_search(6, batch_size=8, low=0.0, high=1.0)
  search = small_nsga2()
  for seed in range(5):
    keys = jax.random.split(jax.random.key(seed), 20)
    candidates, state = play(search, keys, search.state)
    by_chance, _ = play(uniform, keys, None)
    assert ((candidates >= 0) & (candidates <= 1)).all()
    assert dominated_share(state.scores) > dominated_share(nearness(by_chance)) + 0.02


def test_candidates_are_random_until_the_population_is_full():
  search = small_nsga2()
  candidates, _ = play(search, jax.random.split(jax.random.key(0), 6), search.state)
  # Population 20: three batches fill it. Children share variables with their parents, random draws do not.
  assert len(np.unique(candidates[:24])) == 24 * 6
  assert all(np.isin(child, candidates[:24]).any() for child in candidates[24:32])


def test_a_search_is_the_same_again_and_after_a_restart():
  keys = jax.random.split(jax.random.key(7), 10)
  search, restarted = small_nsga2(), small_nsga2()
  candidates, state = play(search, keys, search.state)
  again, _ = play(restarted, keys, restarted.state)
  np.testing.assert_array_equal(again, candidates)
  for stop in (1, 5):  # before the population is full, and after
    _, halfway = play(search, keys[:stop], search.state)
    saved = jax.tree.map(np.array, halfway)
    rest, end = play(restarted, keys[stop:], saved)
    np.testing.assert_array_equal(rest, candidates[8 * stop :])
    jax.tree.map(np.testing.assert_array_equal, end, state)
