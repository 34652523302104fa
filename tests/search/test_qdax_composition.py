"""Composition with QDax, each way: our operators and emitter in its loop, its emitters in ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.containers.mapelites_repertoire import compute_euclidean_centroids
from qdax.core.emitters.cma_improvement_emitter import CMAImprovementEmitter
from qdax.core.emitters.multi_emitter import MultiEmitter
from qdax.core.emitters.mutation_operators import isoline_variation
from qdax.core.emitters.standard_emitters import MixingEmitter
from qdax.core.map_elites import MAPElites
from qdax.tasks.arm import arm, arm_scoring_function
from qdax.utils.metrics import default_qd_metrics

from cqd_jax.archive import Grid, RuleSelector, elite_sampling
from cqd_jax.operators import gaussian_mutation, linear_crossover, linear_merge, svd_mutation
from cqd_jax.search import CycleQD, CycleQDEmitter, PerArchiveEmitter, as_mutation_fn, as_variation_fn

pytestmark = pytest.mark.usefixtures("qdax_ranks")

GRID = Grid(lower=[0.6, 0.0, 0.0], upper=[1.0, 1.0, 1.0], shape=(8, 8, 8))
crossover = functools.partial(linear_merge, std=0.3)
mutation = functools.partial(gaussian_mutation, std=0.05)
isoline = functools.partial(isoline_variation, iso_sigma=0.05, line_sigma=0.1)


def arm_scores(genotypes, key):
  del key
  fitnesses, positions = jax.vmap(arm)(genotypes)
  return jnp.concatenate([1 + fitnesses[:, None], positions], axis=1), {}


def arms(num=12):
  return jax.random.uniform(jax.random.key(5), (num, 6))


def our_emitter(batch_size=8):
  return CycleQDEmitter(batch_size=batch_size, crossover=crossover, mutation=mutation)


def isoline_emitter(batch_size=8):
  return MixingEmitter(
    mutation_fn=as_mutation_fn(mutation), variation_fn=isoline, variation_percentage=0.5, batch_size=batch_size
  )


def cma_emitter(batch_size=8):
  return CMAImprovementEmitter(
    batch_size=batch_size, genotype_dim=6, centroids=jnp.asarray(GRID.centroids(0)), sigma_g=0.2
  )


@pytest.mark.parametrize("selector", [None, RuleSelector(elite_sampling)])
def test_our_operators_in_qdaxs_mixing_emitter_and_loop(selector):
  def mutate_matrix(key, genotype):
    return svd_mutation(key, genotype.reshape(2, 3), max_scale=2.0).reshape(6)

  emitter = MixingEmitter(
    mutation_fn=as_mutation_fn(mutate_matrix),
    variation_fn=as_variation_fn(crossover),
    variation_percentage=0.5,
    batch_size=16,
    selector=selector,
  )
  run_in_map_elites(emitter)


@pytest.mark.parametrize("crossover", [crossover, linear_crossover], ids=["bare", "noting"])
def test_our_emitter_in_qdaxs_loop(crossover):
  run_in_map_elites(CycleQDEmitter(batch_size=8, crossover=crossover, mutation=mutation))


def test_a_variation_of_qdax_is_the_child_without_its_note():
  first, second, key = arms(5), arms(5)[::-1], jax.random.key(3)
  noting, bare = functools.partial(linear_crossover, std=0.3), crossover
  np.testing.assert_allclose(
    as_variation_fn(noting)(first, second, key), as_variation_fn(bare)(first, second, key), rtol=1e-6
  )


def run_in_map_elites(emitter):
  map_elites = MAPElites(arm_scoring_function, emitter, functools.partial(default_qd_metrics, qd_offset=1.0))
  centroids = compute_euclidean_centroids((8, 8), minval=0.0, maxval=1.0)
  repertoire, state, before = map_elites.init(arms(), centroids, jax.random.key(0))
  carry = (repertoire, state, jax.random.key(1))
  (repertoire, state, _), metrics = jax.lax.scan(map_elites.scan_update, carry, length=40)
  assert metrics["coverage"][-1] > before["coverage"]
  assert np.isfinite(np.asarray(metrics["qd_score"])).all()


@pytest.mark.parametrize(
  "make_emitter",
  [
    isoline_emitter,
    lambda: PerArchiveEmitter(isoline_emitter()),
    lambda: PerArchiveEmitter(cma_emitter(), flip_interval=2),
    lambda: PerArchiveEmitter(MultiEmitter((cma_emitter(), isoline_emitter(), our_emitter()))),
    lambda: MultiEmitter((our_emitter(), isoline_emitter(), PerArchiveEmitter(cma_emitter()))),
    lambda: MultiEmitter((CycleQDEmitter(batch_size=4, crossover=linear_crossover), isoline_emitter())),
  ],
  ids=["mixing", "mixing an archive", "CMA an archive", "multi an archive", "ours inside multi", "a note inside multi"],
)
def test_qdaxs_emitters_drive_our_repertoire(make_emitter):
  cycleqd = CycleQD(arm_scores, make_emitter())
  repertoire, state, before = cycleqd.init(arms(), GRID, jax.random.key(0))
  carry = (repertoire, state, jax.random.key(1))
  (repertoire, state, _), metrics = jax.lax.scan(cycleqd.scan_update, carry, length=40)
  assert (np.asarray(metrics["coverage"][-1]) > np.asarray(before["coverage"])).all()
  assert (np.diff(np.asarray(metrics["max_fitness"]), axis=0) >= 0).all()
  alive = np.asarray(repertoire.alive)
  scores, _ = arm_scores(repertoire.genotypes, None)
  np.testing.assert_allclose(np.asarray(scores)[alive], np.asarray(repertoire.scores)[alive], rtol=1e-5, atol=1e-6)


def test_each_archive_has_its_own_cma_that_learns_in_its_turn():
  emitter = PerArchiveEmitter(cma_emitter())
  cycleqd = CycleQD(arm_scores, emitter)
  repertoire, state, _ = cycleqd.init(arms(), GRID, jax.random.key(0))
  update = jax.jit(cycleqd.update)
  for turn in range(3):
    counts = np.asarray(state.states.emit_count)
    repertoire, state, _ = update(repertoire, state, jax.random.key(turn))
    changed = np.flatnonzero(np.asarray(state.states.emit_count) != counts)
    assert set(changed) <= {turn}
    mean = np.asarray(state.states.cmaes_state.mean)
    assert np.abs(mean[turn]).max() > 0  # it starts at zero
    assert not mean[turn + 1 :].any()
