"""The loop: on QDax's arm with three scores in `lax.scan`, by ask and tell, and on bad scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.tasks.arm import arm

from cqd_jax.archive import Grid
from cqd_jax.operators import gaussian_mutation, linear_merge
from cqd_jax.search import CycleQD, CycleQDEmitter

GRID = Grid(lower=[0.6, 0.0, 0.0], upper=[1.0, 1.0, 1.0], shape=(10, 10, 10))


def arm_scores(genotypes, key):
  """QDax's planar arm with K = 3 scores: evenness of the angles, and the two coordinates of the hand."""
  del key
  fitnesses, positions = jax.vmap(arm)(genotypes["angles"])
  return jnp.concatenate([1 + fitnesses[:, None], positions], axis=1), {"reach": positions.sum(axis=1)}


def make_cycleqd(schedule="cycle", batch_size=16):
  emitter = CycleQDEmitter(
    batch_size=batch_size,
    crossover=functools.partial(linear_merge, std=0.3),
    mutation=functools.partial(gaussian_mutation, std=0.05),
    schedule=schedule,
  )
  return CycleQD(arm_scores, emitter)


def initial_arms(num=8):
  return {"angles": jax.random.uniform(jax.random.key(5), (num, 7))}


@pytest.mark.parametrize("schedule", ["cycle", "round_robin"])
def test_a_scan_on_the_arm_fills_all_three_archives(schedule):
  cycleqd = make_cycleqd(schedule)
  repertoire, state, before = cycleqd.init(initial_arms(), GRID, jax.random.key(0))
  carry = (repertoire, state, jax.random.key(1))
  (repertoire, state, _), metrics = jax.lax.scan(cycleqd.scan_update, carry, length=150)
  assert metrics["coverage"].shape == (150, 3)
  assert (np.asarray(metrics["coverage"][-1]) > 5 * np.asarray(before["coverage"])).all()
  assert (np.diff(np.asarray(metrics["max_fitness"]), axis=0) >= 0).all()  # an elite is replaced by better ones only
  assert (np.diff(np.asarray(metrics["qd_score"]), axis=0) >= -1e-4).all()
  assert int(state.iteration) == 150
  assert int(repertoire.num_offered) == 8 + 150 * 16
  # What is stored is what was scored.
  alive = np.asarray(repertoire.alive)
  scores, _ = arm_scores(repertoire.genotypes, None)
  np.testing.assert_allclose(np.asarray(scores)[alive], np.asarray(repertoire.scores)[alive], rtol=1e-5, atol=1e-6)
  reach = np.asarray(repertoire.extra_scores["reach"])[alive]
  np.testing.assert_allclose(reach, np.asarray(repertoire.scores)[alive, 1:].sum(axis=1), rtol=1e-5)


def test_ask_and_tell_do_what_update_does():
  cycleqd = make_cycleqd()
  start = cycleqd.init(initial_arms(), GRID, jax.random.key(0))[:2]
  updated = jax.jit(cycleqd.update)(*start, jax.random.key(3))
  ask_key, score_key = jax.random.split(jax.random.key(3))
  genotypes, extra_info = jax.jit(cycleqd.ask)(*start, ask_key)
  scores, extra_scores = arm_scores(genotypes, score_key)
  told = jax.jit(cycleqd.tell)(genotypes, scores, *start, extra_scores, extra_info)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), updated, told)


def test_the_loop_compiles_once_and_donates_the_pool(caplog):
  cycleqd = make_cycleqd(batch_size=4)
  repertoire, state, _ = cycleqd.init(initial_arms(), GRID, jax.random.key(0))
  update = jax.jit(cycleqd.update, donate_argnums=(0, 1))
  repertoire, state, _ = update(repertoire, state, jax.random.key(1))
  pointer = repertoire.genotypes["angles"].unsafe_buffer_pointer()
  keys = list(jax.random.split(jax.random.key(2), 5))
  with jax.log_compiles():
    for key in keys:
      repertoire, state, _ = update(repertoire, state, key)
  assert "Compiling" not in caplog.text
  assert repertoire.genotypes["angles"].unsafe_buffer_pointer() == pointer


def test_children_with_failed_evaluations_are_counted_and_not_kept():
  cycleqd = make_cycleqd(batch_size=4)
  repertoire, state, _ = cycleqd.init(initial_arms(), GRID, jax.random.key(0))
  genotypes, extra_info = jax.jit(cycleqd.ask)(repertoire, state, jax.random.key(1))
  scores = jnp.full((4, 3), jnp.nan).at[0].set(jnp.array([2.0, 2.0, 2.0]))
  extra_scores = {"reach": jnp.zeros(4)}
  after, state, _ = jax.jit(cycleqd.tell)(genotypes, scores, repertoire, state, extra_scores, extra_info)
  assert int(after.num_rejected) == 3
  assert [float(after.best(k).scores[k]) for k in range(3)] == [2.0, 2.0, 2.0]
  assert int(state.iteration) == 1


def test_a_population_without_finite_scores_is_refused_before_the_loop():
  cycleqd = CycleQD(lambda genotypes, key: (jnp.full((8, 3), jnp.nan), {}), make_cycleqd()._emitter)
  with pytest.raises(ValueError, match="archives are empty"):
    cycleqd.init(initial_arms(), GRID, jax.random.key(0))


def test_without_a_scoring_function_there_is_only_ask_and_tell():
  cycleqd = CycleQD(None, make_cycleqd()._emitter)
  with pytest.raises(ValueError, match="scoring_fn"):
    cycleqd.init(initial_arms(), GRID, jax.random.key(0))


def test_scores_may_be_numpy_arrays():
  cycleqd = CycleQD(
    lambda genotypes, key: (np.asarray(genotypes["w"], np.float64), {}),
    CycleQDEmitter(batch_size=2, crossover=functools.partial(linear_merge, std=0.0)),
  )
  experts = {"w": np.eye(3)}
  repertoire, state, _ = cycleqd.init(experts, Grid([0] * 3, [1] * 3, (4, 4, 4)), jax.random.key(0))
  repertoire, _, _ = cycleqd.update(repertoire, state, jax.random.key(1))
  assert int(repertoire.num_offered) == 5
