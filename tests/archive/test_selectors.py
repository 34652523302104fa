"""Probabilities against float64 NumPy written from the paper's formula; pairs against their exact distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.archive import (
  CyclingRepertoire,
  Grid,
  RuleSelector,
  elite_sampling,
  reference_elite_sampling,
  select_pairs,
  uniform_sampling,
)


def random_archive(seed, num_cells=40, num_descriptors=2):
  generator = np.random.default_rng(seed)
  occupied = generator.uniform(size=num_cells) < 0.6
  fitnesses = np.where(occupied, generator.uniform(-1, 1, num_cells), -np.inf).astype(np.float32)
  descriptors = generator.uniform(-2, 3, (num_cells, num_descriptors)).astype(np.float32)
  bins = generator.integers(0, 15, (num_cells, num_descriptors))
  return jnp.asarray(fitnesses), jnp.asarray(descriptors), jnp.asarray(bins), jnp.asarray(occupied)


def expected(columns, occupied, factor):
  """gamma_j / sum gamma with gamma_j a product over columns, elite by elite in float64."""
  columns, occupied = np.asarray(columns), np.asarray(occupied)
  elites = np.flatnonzero(occupied)
  gamma = np.zeros(len(occupied))
  for j in elites:
    gamma[j] = 1.0
    for column in columns.T.astype(np.float64):
      low, high = column[elites].min(), column[elites].max()
      gamma[j] *= factor(column[j], low, high)
  return gamma / gamma.sum()


def paper_factor(score, low, high):
  norm = 0.0 if high == low else (score - low) / (high - low)
  return 0.5 + norm * (0.8 - 0.5)


def reference_factor(score, low, high):
  return 1.0 if high == low else 0.5 + (score - low) * 0.8 / (high - low)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_descriptors", [1, 2, 7])
def test_elite_sampling_is_the_papers(seed, num_descriptors):
  fitnesses, descriptors, bins, occupied = random_archive(seed, num_descriptors=num_descriptors)
  found = jax.jit(elite_sampling)(fitnesses, descriptors, bins, occupied)
  columns = np.concatenate([fitnesses[:, None], descriptors], axis=1)
  np.testing.assert_allclose(found, expected(columns, occupied, paper_factor), rtol=2e-5)
  assert not np.asarray(found)[~np.asarray(occupied)].any()


@pytest.mark.parametrize("seed", range(5))
def test_reference_elite_sampling_is_that_of_the_public_code(seed):
  fitnesses, descriptors, bins, occupied = random_archive(seed)
  bins = bins.at[:, 1].set(4)  # a column without spread
  found = jax.jit(reference_elite_sampling)(fitnesses, descriptors, bins, occupied)
  columns = np.concatenate([fitnesses[:, None], bins], axis=1)
  np.testing.assert_allclose(found, expected(columns, occupied, reference_factor), rtol=2e-5)


def test_the_reference_reads_cells_where_the_paper_reads_scores():
  fitnesses, descriptors, bins, occupied = random_archive(1)
  moved = descriptors * 3 - 1
  assert not np.allclose(
    elite_sampling(fitnesses, descriptors, bins, occupied), reference_elite_sampling(fitnesses, moved, bins, occupied)
  )


def test_uniform_sampling():
  _, descriptors, bins, occupied = random_archive(2)
  found = uniform_sampling(jnp.zeros(40), descriptors, bins, occupied)
  np.testing.assert_allclose(found, np.asarray(occupied) / np.sum(occupied), rtol=1e-6)


@pytest.mark.parametrize("rule", [elite_sampling, reference_elite_sampling, uniform_sampling])
def test_one_elite_and_equal_elites_have_plain_probabilities(rule):
  occupied = jnp.array([False, True, False])
  scores, bins = jnp.array([-jnp.inf, 0.3, -jnp.inf]), jnp.zeros((3, 2), jnp.int32)
  np.testing.assert_allclose(rule(scores, jnp.zeros((3, 2)), bins, occupied), [0, 1, 0], rtol=1e-6)
  both = jnp.array([True, True, False])
  equal = jnp.array([0.5, 0.5, -jnp.inf])
  np.testing.assert_allclose(rule(equal, jnp.ones((3, 2)), bins, both), [0.5, 0.5, 0], rtol=1e-6)


def test_the_two_of_a_pair_are_drawn_without_replacement():
  probabilities = np.array([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
  draws = 20_000
  pairs = np.asarray(select_pairs(jax.random.key(1), jnp.asarray(probabilities, jnp.float32), draws))
  for first, second in itertools.product(range(6), repeat=2):
    share = ((pairs[:, 0] == first) & (pairs[:, 1] == second)).mean()
    exact = 0.0
    if first != second and probabilities[first] > 0:
      exact = probabilities[first] * probabilities[second] / (1 - probabilities[first])
    # Five standard deviations of a binomial; the key is fixed, so this cannot change from run to run.
    assert abs(share - exact) <= 5 * np.sqrt(exact * (1 - exact) / draws)


@pytest.mark.parametrize("num_cells", [2, 3, 225, 50_000])
def test_parents_differ_whenever_two_elites_are_there(num_cells):
  generator = np.random.default_rng(num_cells)
  for spread in (1.0, 20.0):
    weights = np.exp(spread * generator.normal(size=num_cells))
    weights[generator.uniform(size=num_cells) < 0.5] = 0
    weights[:2] = np.maximum(weights[:2], max(weights.max(), 1) * 1e-6)
    weights = weights.astype(np.float32)
    pairs = np.asarray(select_pairs(jax.random.key(0), jnp.asarray(weights / weights.sum()), 500))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert (weights[pairs] > 0).all()


def test_with_one_elite_both_parents_are_it():
  pairs = select_pairs(jax.random.key(0), jnp.array([0.0, 0.0, 1.0, 0.0]), 5)
  np.testing.assert_array_equal(pairs, np.full((5, 2), 2))


@pytest.mark.usefixtures("qdax_ranks")
def test_a_rule_serves_qdax_as_a_selector():
  grid = Grid(lower=[0.0] * 2, upper=[1.0] * 2, shape=(5, 5))
  scores = np.array([[0.9, 0.1], [0.2, 0.5], [0.6, 0.9]])
  archive = CyclingRepertoire.init({"w": jnp.asarray(scores)}, scores, grid).archive(0)
  occupied = np.asarray(archive.fitnesses[:, 0]) > -np.inf
  columns = np.concatenate([archive.fitnesses, archive.descriptors], axis=1)
  exact = expected(columns, occupied, paper_factor)
  sample = archive.select(jax.random.key(0), 20_000, RuleSelector(elite_sampling))
  for cell in np.flatnonzero(occupied):
    share = (np.asarray(sample.fitnesses[:, 0]) == archive.fitnesses[cell, 0]).mean()
    assert abs(share - exact[cell]) <= 5 * np.sqrt(exact[cell] / 20_000)  # five standard deviations, fixed key


def test_an_empty_cell_of_a_large_archive_is_never_drawn():
  # A plain running sum gives 21 empty cells among these two million draws: its last bits are not monotone. The key is
  # fixed, so the count is the same each time.
  generator = np.random.default_rng(0)
  weights = np.where(generator.uniform(size=50_625) < 0.1, generator.uniform(0.1, 1, 50_625), 0)
  probabilities = jnp.asarray(weights / weights.sum(), jnp.float32)
  pairs = jax.jit(select_pairs, static_argnums=2)(jax.random.key(1), probabilities, 1_000_000)
  assert (weights[np.asarray(pairs)] > 0).all()
