"""TIES and DARE of the experts, each with the settings that do best: trials against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.config.plugs import Plug, resolve
from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.space import core_space, dense_space, take
from cqd_jax.search.algorithm import SearchContext
from cqd_jax.tasks import Scored

FIRST = np.array([[4.0, -3.0, 0.5, 0.0], [1.0, -2.0, 0.25, 8.0]], np.float32)
SECOND = np.array([[2.0, 6.0, -0.5, 1.0], [-0.1, -4.0, 3.0, 0.2]], np.float32)
BASE = {"Dense_0": {"kernel": np.zeros((2, 4), np.float32)}}
EXPERTS = {"Dense_0": {"kernel": np.stack([FIRST, SECOND])}}


def keep(rank, make):
  return make()


def make(use, in_core=False, **settings):
  root = dense_space(jax.tree.map(jnp.asarray, BASE), jax.tree.map(jnp.asarray, EXPERTS))
  if in_core:
    root = core_space(CoreBasis.from_experts(root.base, root.experts))
  return resolve("methods", Plug(use, settings), use)(SearchContext(root, keep, ("one", "two"), 40))


def tried(algorithm, means):
  """All trials, of which the n-th is told the n-th mean: the state, the kernels, and the notes."""
  scored = Scored(np.zeros((2, 2, 3), np.float32))
  state = algorithm.init(jax.random.key(3), algorithm.space.initial, scored)
  ask, tell = jax.jit(algorithm.ask), jax.jit(algorithm.tell)
  kernels, notes = [], []
  for mean in means:
    children, info = ask(state, jax.random.key(9))
    kernels.append(np.asarray(children["Dense_0"]["kernel"])[0])
    notes.append({name: float(value[0]) for name, value in info.note.items()})
    state, metrics = tell(state, children, Scored(jnp.full((1, 2, 3), mean)), info)
    np.testing.assert_allclose(metrics["best_mean"], np.nanmax(means[: len(notes)]), rtol=1e-6)
  return state, kernels, notes


def ties_by_hand(density):
  """Each entry the mean of those kept that have the sign of their sum; 8 entries a kernel."""
  kept = []
  for expert in np.float64(EXPERTS["Dense_0"]["kernel"]):
    cut = np.sort(np.abs(expert).ravel())[::-1][max(1, int(density * 8)) - 1]
    kept.append(np.where(np.abs(expert) >= cut, expert, 0))
  total = sum(kept)
  agree = [(np.sign(each) == np.sign(total)) & (total != 0) for each in kept]
  return sum(np.where(says, each, 0) for says, each in zip(agree, kept, strict=True)) / np.maximum(sum(agree), 1)


def test_ties_is_tried_with_each_density_and_scale():
  algorithm = make("ties", densities=[0.25, 0.5], scales=[1.0, 2.0, 0.5])
  assert (algorithm.batch_size, algorithm.budget) == (1, 6)
  means = [0.1, 0.3, np.nan, 0.2, 0.3, 0.25]
  state, kernels, notes = tried(algorithm, means)
  settings = [(density, scale) for density in (0.25, 0.5) for scale in (1.0, 2.0, 0.5)]
  for (density, scale), kernel, note in zip(settings, kernels, notes, strict=True):
    assert note == {"density": density, "scale": scale}
    np.testing.assert_allclose(kernel, scale * ties_by_hand(density), rtol=1e-6)
  population = algorithm.population(state)
  assert population.chosen == {"density": 0.25, "scale": 2.0}  # the first of equals
  np.testing.assert_array_equal(population.identities, [2 + 1])
  np.testing.assert_array_equal(take(population.genotypes, 0)["Dense_0"]["kernel"], kernels[1])


def test_dare_draws_once_for_each_drop_rate_and_offers_what_was_drawn():
  algorithm = make("dare", drop_rates=[0.5, 0.75], scales=[0.5, 1.0])
  state, kernels, notes = tried(algorithm, [0.1, 0.2, 0.9, 0.3])
  assert notes[2] == {"drop_rate": 0.75, "scale": 0.5}
  for place, kept_share in ((0, 0.5), (2, 0.25)):
    np.testing.assert_allclose(2 * kernels[place], kernels[place + 1], rtol=1e-6)
    possible = np.stack([0 * FIRST, FIRST, SECOND, FIRST + SECOND]) / kept_share
    assert (np.abs(possible - kernels[place + 1]).min(axis=0) < 1e-5).all()
  assert (kernels[0] * 2 != kernels[3]).any()
  population = algorithm.population(state)
  assert population.chosen == {"drop_rate": 0.75, "scale": 0.5}
  np.testing.assert_array_equal(take(population.genotypes, 0)["Dense_0"]["kernel"], kernels[2])


@pytest.mark.parametrize(
  ("use", "settings", "message"),
  [
    ("ties", {"densities": []}, "trials: expected at least one"),
    ("ties", {"densities": [0.5, 0.0]}, r"density: expected a share in \(0, 1\], got 0.0"),
    ("dare", {"drop_rates": [1.0]}, r"drop_rate: expected a probability in \[0, 1\), got 1.0"),
    ("dare", {"scales": []}, "scales: expected at least one"),
  ],
)
def test_what_cannot_be_tried_is_refused_by_name(use, settings, message):
  with pytest.raises(ValueError, match=message):
    make(use, **settings)


@pytest.mark.parametrize("use", ["ties", "dare"])
def test_what_looks_at_single_weights_is_refused_on_cores(use):
  with pytest.raises(ValueError, match=rf"merge scaled_{use}: elementwise, .* core"):
    make(use, in_core=True)
  make("task_arithmetic", in_core=True)
