"""M2N2: what members are worth and whom they attract, against NumPy; who is drawn, and who goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.config.plugs import Plug, resolve
from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.space import core_space, dense_space
from cqd_jax.search import Algorithm, Info, SearchContext
from cqd_jax.search.natural_niches import NOBODY, attraction, competition
from cqd_jax.tasks import Scored, TracedProblem, task_scores

NAMES = ("left", "right")
NAN = np.nan


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def context(in_core=False):
  experts = {"kernel": jnp.asarray(draw(0, 2, 4, 3)), "bias": jnp.asarray(draw(1, 2, 3))}
  root = dense_space(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), experts), experts)
  if in_core:
    root = core_space(CoreBasis.from_experts(root.base, root.experts))
  return SearchContext(root, lambda rank, make: make(), NAMES, 40)


def make(making=None, **settings):
  return resolve("methods", Plug("m2n2", settings), "m2n2")(making or context())


def shares_of(values, alpha):
  """In float64, one sample after another."""
  rewards = np.where(np.isfinite(values), values, 0).astype(np.float64).clip(0).reshape(len(values), -1)
  columns = [column / column.sum() ** alpha if column.sum() > 0 else 0 * column for column in rewards.T]
  return np.stack(columns, axis=1)


def verdicts(seed, *shape):
  """0 and 1; the last sample of the second task is not there."""
  values = np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)
  values[..., 1, -1] = NAN
  return values


VALUES = {
  "verdicts": verdicts(2, 5, 2, 6),
  "rewards": np.random.default_rng(3).uniform(0, 2, (4, 2, 3)).astype(np.float32),
  "odd": np.array([[[1, NAN, 0.5]], [[np.inf, -1, 0.25]], [[NAN] * 3], [[2, -np.inf, 0]]], np.float32),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", VALUES)
def test_competition_and_attraction_are_the_papers(name, alpha):
  values = VALUES[name]
  shares = shares_of(values, alpha)
  found = competition(jnp.asarray(values), alpha=alpha)
  assert (found.shape, found.dtype) == ((len(values),), jnp.float32)
  np.testing.assert_allclose(found, shares.sum(axis=1), rtol=1e-6)
  for first in range(len(values)):
    added = (shares - shares[first]).clip(0).sum(axis=1)
    expected = added / added.sum() if added.sum() > 0 else added
    found = attraction(jnp.asarray(values), first, alpha=alpha)
    assert (found.shape, found.dtype) == ((len(values),), jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_what_one_member_alone_solves_is_worth_as_much_as_what_all_share():
  values = jnp.array([[[1.0, 1.0, 0.0, 0.0]], [[1.0, 0.0, 1.0, 0.0]], [[1.0, 1.0, 0.0, 0.0]]])
  np.testing.assert_allclose(competition(values), [1 / 3 + 1 / 2, 1 / 3 + 1, 1 / 3 + 1 / 2], rtol=1e-6)
  np.testing.assert_allclose(competition(values, alpha=0.0), [2, 2, 2])
  np.testing.assert_allclose(attraction(values, 0), [0, 1, 0])
  np.testing.assert_allclose(attraction(values, 1), [0.5, 0, 0.5])
  np.testing.assert_array_equal(attraction(values[:1], 0), [0])


def begin(algorithm, values):
  """The state with individuals whose genotypes are their numbers."""
  values = np.asarray(values, np.float32)
  return algorithm.init(jax.random.key(0), numbered(jnp.arange(len(values), dtype=jnp.float32)), Scored(values))


def numbered(numbers):
  return {"kernel": jnp.tile(numbers[:, None, None], (1, 4, 3)), "bias": jnp.tile(numbers[:, None], (1, 3))}


def chances(values, members, attracted):
  """With which probability each pair of places is drawn, in float64."""
  shares = shares_of(values, 1.0)
  fitness = shares.sum(axis=1)
  fitness = fitness if fitness.sum() > 0 else np.asarray(members, np.float64)
  fitness = fitness / fitness.sum()
  pairs = np.zeros((len(values), len(values)))
  for first, chance in enumerate(fitness):
    added = (shares - shares[first]).clip(0).sum(axis=1)
    partner = added / added.sum() if attracted and added.sum() > 0 else fitness
    pairs[first] = chance * partner
  return pairs


ALIKE = np.tile(np.array([[[1, 0, 1], [0, 1, NAN]]], np.float32), (4, 1, 1))
PAIRS = 6000


@functools.cache
def drawing(attracted):
  """A search with many children a batch, and who their parents are; tests share what is compiled."""
  algorithm = make(population_size=5, batch_size=PAIRS, attracted=attracted)
  return algorithm, jax.jit(lambda state, key: algorithm.ask(state, key)[1].parents)


@pytest.mark.parametrize(
  ("values", "attracted"),
  [
    (verdicts(4, 4, 2, 3), True),
    (verdicts(4, 4, 2, 3), False),
    (ALIKE, True),
    (0 * ALIKE, True),
  ],
  ids=["attracted", "by fitness only", "nobody adds anything", "nobody solves anything"],
)
def test_parents_are_drawn_as_often_as_the_paper_says(values, attracted):
  # 6000 pairs: a count with chance p has a standard deviation of sqrt(6000 p (1 - p)); the bound is 6 of them, so that
  # a change of the generator breaks one of 100 once in 10^6 times.
  algorithm, parents_of = drawing(attracted)
  state = begin(algorithm, values)
  parents = np.asarray(parents_of(state, jax.random.key(1)))
  assert parents.shape == (PAIRS, 2)
  np.testing.assert_array_equal(np.asarray(state.identities)[: len(values)], np.arange(len(values)))
  counts = np.zeros((5, 5))
  np.add.at(counts, tuple(parents.T), 1)
  places = np.pad(values, [(0, 5 - len(values)), (0, 0), (0, 0)], constant_values=NAN)
  pairs = chances(places, np.arange(5) < len(values), attracted)
  assert (np.abs(counts - PAIRS * pairs) <= 6 * np.sqrt(PAIRS * pairs * (1 - pairs))).all()


def who_stays(values, size):
  """The identities in each place after all were offered in turn, by float64."""
  places = []
  for identity, own in enumerate(values):
    if np.isnan(own).all(axis=-1).any():
      continue
    if len(places) < size:
      places.append(identity)
      continue
    fitness = shares_of(values[[*places, identity]], 1.0).sum(axis=1)
    worst = int(np.flatnonzero(fitness <= fitness.min() + 1e-9)[0])  # the first of equals
    if worst < size:
      places[worst] = identity
  return places


def test_the_worst_of_all_goes_whatever_the_batch():
  values = verdicts(5, 26, 2, 9)
  values[[1, 7]], values[12, 1] = NAN, NAN  # an expert and a child that failed, and a child that failed on one task
  numbers = jnp.arange(26, dtype=jnp.float32)
  ends = []
  for size in (1, 4):
    algorithm = make(population_size=6, batch_size=size)
    tell = jax.jit(algorithm.tell)
    state = begin(algorithm, values[:2])
    np.testing.assert_array_equal(state.identities, [0, *[NOBODY] * 5])
    for turn in range(2, 26, size):
      rows = slice(turn, turn + size)
      state, metrics = tell(state, numbered(numbers[rows]), Scored(values[rows]), Info())
    ends.append(state)
  jax.tree.map(np.testing.assert_array_equal, *ends)
  population = algorithm.population(state)
  assert population.identities.tolist() == who_stays(values, 6)
  assert len(set(population.identities) & {1, 7, 12}) == 0
  np.testing.assert_array_equal(population.values, values[population.identities])
  np.testing.assert_array_equal(population.genotypes["kernel"][:, 0, 0], population.identities)
  np.testing.assert_allclose(population.scores, task_scores(values[population.identities]), rtol=1e-6)
  np.testing.assert_allclose(metrics["best_mean"], population.scores.mean(axis=1).max(), rtol=1e-6)


def test_the_population_before_the_first_child_is_the_experts_that_did_not_fail():
  algorithm = make(population_size=2)
  values = np.concatenate([np.full((1, 2, 3), NAN, np.float32), ALIKE])
  # Of four that are alike the third takes the place of the first, and the fourth that of the third.
  assert algorithm.population(begin(algorithm, values)).identities.tolist() == [4, 2]
  with pytest.raises(ValueError, match="scores: expected an individual with finite scores on all tasks, got none"):
    begin(algorithm, values[:1])


def nearness(params, data):
  """Whether each weight is near that of a target, for two targets."""
  near = jax.tree.map(lambda leaf, target: jnp.abs(leaf[None] - target).reshape(2, -1) < 0.5, params, data)
  return jnp.concatenate(jax.tree.leaves(near), axis=1).astype(jnp.float32)


def test_it_runs_whole_inside_a_scan_and_finds_what_no_expert_has():
  making = context()
  target = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[1]]), making.root.experts)
  problem = TracedProblem(nearness, {"validation": target, "test": target}, task_names=NAMES)
  algorithm = make(making, batch_size=2, population_size=8, mutation={"use": "gaussian", "std": 0.1})
  assert isinstance(algorithm, Algorithm)
  assert algorithm.variation == "split_slerp, gaussian 0.1"

  def one(state, key):
    children, info = algorithm.ask(state, key)
    assert set(info.note) == {"t", "angle", "split"}
    return algorithm.tell(state, children, Scored(problem.traced_values("validation", children, algorithm.space)), info)

  initial = algorithm.space.initial
  state = algorithm.init(jax.random.key(0), initial, problem.score("validation", initial, algorithm.space))
  keys = jax.random.split(jax.random.key(1), 60)
  state, metrics = jax.jit(lambda state, keys: jax.lax.scan(one, state, keys))(state, keys)
  assert metrics["best_mean"].shape == (60,)
  assert int(state.asked) == 2 + 2 * 60
  experts = task_scores(problem.score("validation", initial, algorithm.space).values).mean(axis=1)
  assert algorithm.population(state).scores.mean(axis=1).max() > experts.max()


@pytest.mark.parametrize(
  ("settings", "in_core", "variation"),
  [
    ({}, False, "split_slerp"),
    ({"genotype": "core"}, True, "slerp"),
    ({"genotype": "coefficients"}, False, "iso 0.15, line 0.3"),
    ({"crossover": "linear", "mutation": {"use": "svd", "max_scale": 2}}, False, "svd 2"),
  ],
)
def test_how_children_are_made_follows_from_the_space(settings, in_core, variation):
  assert make(context(in_core), **settings).variation == variation


@pytest.mark.parametrize(
  ("settings", "in_core", "message"),
  [
    ({"population_size": 1}, False, "population_size: expected at least 2, got 1"),
    ({"batch_size": 0}, False, "batch_size: expected at least 1, got 0"),
    ({"alpha": -0.5}, False, "alpha: expected a finite number of at least 0.0, got -0.5"),
    (
      {"mutation": {"use": "expert_svd", "rate": 0.1}},
      False,
      "mutation: expert_svd adds part of the expert of the active task",
    ),
    ({"genotype": "core", "crossover": "split_slerp"}, True, "crossover split_slerp_crossover: elementwise"),
  ],
)
def test_settings_that_cannot_be_used_are_refused(settings, in_core, message):
  with pytest.raises(ValueError, match=message):
    make(context(in_core), **settings)
