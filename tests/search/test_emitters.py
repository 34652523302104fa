"""Which parents become which children: schedules, lineage, task context, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.archive import Centroids, CyclingRepertoire, Grid, reference_elite_sampling, uniform_sampling
from cqd_jax.operators import (
  Child,
  expert_svd_mutation,
  factorize,
  gaussian_mutation,
  line_crossover,
  linear_crossover,
  linear_merge,
  slerp_crossover,
)
from cqd_jax.search import CycleQDEmitter

GRID = Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(4, 4, 4))
mean_of_parents = functools.partial(linear_merge, std=0.0)


def small_repertoire(num=3, cells=GRID):
  """Individuals whose only weight is their identity; each in its own cells."""
  generator = np.random.default_rng(0)
  scores = generator.uniform(size=(num, cells.num_tasks))
  return CyclingRepertoire.init({"w": jnp.arange(num, dtype=jnp.float32)[:, None]}, scores, cells)


def start(emitter, repertoire):
  scores = repertoire.scores
  return emitter.init(jax.random.key(0), repertoire, repertoire.genotypes, scores, scores, {})


@pytest.mark.parametrize(
  ("schedule", "flip_interval", "expected"),
  [
    ("cycle", 1, [[0] * 5, [1] * 5, [2] * 5, [0] * 5]),
    ("cycle", 2, [[0] * 5, [0] * 5, [1] * 5, [1] * 5]),
    ("round_robin", 1, [[0, 1, 2, 0, 1], [1, 2, 0, 1, 2], [2, 0, 1, 2, 0], [0, 1, 2, 0, 1]]),
    ("fixed", 1, [[0] * 5] * 4),
  ],
)
def test_schedules(schedule, flip_interval, expected):
  emitter = CycleQDEmitter(batch_size=5, crossover=mean_of_parents, schedule=schedule, flip_interval=flip_interval)
  repertoire = small_repertoire()
  state = start(emitter, repertoire)
  emit = jax.jit(emitter.emit)
  for archives in expected:
    _, info = emit(repertoire, state, jax.random.key(1))
    np.testing.assert_array_equal(info["archive"], archives)
    state = emitter.state_update(state)


@pytest.mark.parametrize("schedule", ["cycle", "round_robin"])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_parents_come_from_the_active_archive_and_children_are_theirs(schedule, batch_size):
  repertoire = small_repertoire(num=60)
  emitter = CycleQDEmitter(batch_size=batch_size, crossover=mean_of_parents, schedule=schedule, rule=uniform_sampling)
  state = start(emitter, repertoire).replace(iteration=jnp.int32(1))
  children, info = jax.jit(emitter.emit)(repertoire, state, jax.random.key(batch_size))
  members = [set(np.asarray(row)[np.asarray(row) >= 0].tolist()) for row in repertoire.slots]
  # Nothing has been recycled yet, so a slot that is alive holds the individual of its rank among those that entered.
  identity = np.asarray(repertoire.lineage.identity)
  for parents, archive, child in zip(info["parents"], info["archive"], children["w"], strict=True):
    first, second = (int(np.flatnonzero(identity == parent)[0]) for parent in parents)
    assert first != second
    assert {first, second} <= members[int(archive)]
    np.testing.assert_allclose(child[0], (float(parents[0]) + float(parents[1])) / 2)


def test_one_elite_is_both_parents():
  repertoire = small_repertoire(num=1)
  emitter = CycleQDEmitter(batch_size=4, crossover=mean_of_parents)
  _, info = emitter.emit(repertoire, start(emitter, repertoire), jax.random.key(0))
  np.testing.assert_array_equal(info["parents"], np.zeros((4, 2)))


@pytest.mark.parametrize("schedule", ["cycle", "round_robin"])
def test_the_mutation_gets_the_experts_factors_of_the_active_task(schedule):
  experts = {"w": jnp.stack([jnp.eye(3) * scale for scale in (1.0, 10.0, 100.0)])}
  factors = jax.vmap(factorize)(experts)
  scores = np.random.default_rng(1).uniform(size=(2, 3))
  repertoire = CyclingRepertoire.init({"w": jnp.zeros((2, 3, 3))}, scores, GRID)
  emitter = CycleQDEmitter(
    batch_size=6,
    crossover=mean_of_parents,
    mutation=functools.partial(expert_svd_mutation, rate=0.1),
    task_context=factors,
    schedule=schedule,
  )
  state = start(emitter, repertoire)
  emit = jax.jit(emitter.emit)
  for turn in range(3):
    children, info = emit(repertoire, state, jax.random.key(turn))
    largest = np.abs(children["w"]).max(axis=(1, 2))
    bound = 0.1 * 10.0 ** np.asarray(info["archive"])
    assert (largest <= bound * 1.001).all()
    assert (largest > bound * 0.1).all()  # all three u below 0.1: probability 1e-3 a child; the keys are fixed
    state = emitter.state_update(state)


def test_rules_and_voronoi_cells_work_together():
  cells = Centroids.cvt(jax.random.key(0), num_cells=9, lower=[0.0] * 5, upper=[1.0] * 5)
  repertoire = small_repertoire(num=20, cells=cells)
  emitter = CycleQDEmitter(batch_size=3, crossover=mean_of_parents, rule=reference_elite_sampling)
  children, _ = emitter.emit(repertoire, start(emitter, repertoire), jax.random.key(0))
  assert np.isfinite(np.asarray(children["w"])).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"flip_interval": 0}, "flip_interval"),
    ({"schedule": "random"}, "schedule: expected"),
    ({"task_context": {"w": jnp.zeros((3, 1))}}, "task_context"),
  ],
)
def test_bad_settings_are_refused_by_name(change, message):
  # beartype would refuse an unknown schedule before we do; users run without it
  make = getattr(CycleQDEmitter.__init__, "__wrapped__", CycleQDEmitter.__init__)
  with pytest.raises(ValueError, match=message):
    make(object.__new__(CycleQDEmitter), **{"batch_size": 2, "crossover": mean_of_parents, **change})


def test_a_task_context_of_the_wrong_length_is_refused():
  emitter = CycleQDEmitter(
    batch_size=2, crossover=mean_of_parents, mutation=lambda key, child, _: child, task_context={"w": jnp.zeros((4, 1))}
  )
  with pytest.raises(ValueError, match="task_context"):
    start(emitter, small_repertoire())


def test_an_emitter_starts_again_after_its_state_was_donated():
  experts = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2)), jnp.float32)}
  emitter = CycleQDEmitter(
    batch_size=2,
    crossover=mean_of_parents,
    mutation=functools.partial(expert_svd_mutation, rate=0.1),
    task_context=jax.vmap(factorize)(experts),
  )
  repertoire = CyclingRepertoire.init(experts, np.full((3, 3), 0.5), GRID)
  update = jax.jit(emitter.state_update, donate_argnums=0)
  assert int(update(start(emitter, repertoire)).iteration) == 1
  assert int(update(start(emitter, repertoire)).iteration) == 1


def test_what_the_crossover_tells_is_told_of_each_child():
  """With one parent 0 and one parent 1 a child is the weight of the parent that is 1."""
  repertoire = CyclingRepertoire.init(
    {"w": jnp.array([[0.0], [1.0]])}, np.array([[0.1, 0.9, 0.5], [0.8, 0.2, 0.4]]), GRID
  )
  emitter = CycleQDEmitter(
    batch_size=16, crossover=functools.partial(linear_merge, std=0.5, with_weights=True), crossover_has_aux=True
  )
  children, info = jax.jit(emitter.emit)(repertoire, start(emitter, repertoire), jax.random.key(0))
  assert info["crossover"].shape == (16, 2, 1)
  for child, parents, weights in zip(children["w"], info["parents"], info["crossover"], strict=True):
    np.testing.assert_allclose(child[0], weights[int(np.argmax(parents)), 0], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cycle", "round_robin"])
def test_the_note_of_a_child_is_told_of_each_child(schedule):
  """With one parent 0 and one parent 1 a child is the weight of the parent that is 1."""
  repertoire = CyclingRepertoire.init(
    {"w": jnp.array([[0.0], [1.0]])}, np.array([[0.1, 0.9, 0.5], [0.8, 0.2, 0.4]]), GRID
  )
  emitter = CycleQDEmitter(batch_size=16, crossover=functools.partial(linear_crossover, std=0.5), schedule=schedule)
  children, info = jax.jit(emitter.emit)(repertoire, start(emitter, repertoire), jax.random.key(0))
  assert set(info) == {"parents", "archive", "note"}
  assert set(info["note"]) == {"weights"}
  assert info["note"]["weights"].shape == (16, 2, 1)
  for child, parents, weights in zip(children["w"], info["parents"], info["note"]["weights"], strict=True):
    np.testing.assert_allclose(child[0], weights[int(np.argmax(parents)), 0], rtol=1e-6)


def test_a_child_and_its_bare_genotype_are_the_same_to_the_emitter():
  repertoire = small_repertoire(num=6)
  mutation = functools.partial(gaussian_mutation, std=0.1)

  def bare(key, first, second):
    return slerp_crossover(key, first, second).genotype

  emitted = []
  for crossover in (slerp_crossover, bare):
    emitter = CycleQDEmitter(batch_size=8, crossover=crossover, mutation=mutation)
    emitted.append(jax.jit(emitter.emit)(repertoire, start(emitter, repertoire), jax.random.key(0)))
  (children, info), (same_children, same_info) = emitted
  np.testing.assert_allclose(children["w"], same_children["w"], rtol=1e-6)
  note = info.pop("note")
  assert {name: value.shape for name, value in note.items()} == {"t": (8,), "angle": (8,)}
  assert len(np.unique(note["t"])) == 8
  assert set(info) == set(same_info)
  jax.tree.map(np.testing.assert_array_equal, info, same_info)


def test_an_empty_note_is_told_as_empty():
  emitter = CycleQDEmitter(batch_size=3, crossover=line_crossover)
  repertoire = small_repertoire()
  children, info = jax.jit(emitter.emit)(repertoire, start(emitter, repertoire), jax.random.key(0))
  assert info["note"] == {}
  assert children["w"].shape == (3, 1)


def test_a_crossover_of_ones_own_notes_what_it_likes():
  def first_half(key, first, second):
    coin = jax.random.bernoulli(key)
    genotype = jax.tree.map(lambda one, other: jnp.where(coin, one, other), first, second)
    return Child(genotype, {"coin": coin, "both": {"sum": first["w"] + second["w"]}})

  emitter = CycleQDEmitter(batch_size=8, crossover=first_half)
  repertoire = small_repertoire()
  children, info = jax.jit(emitter.emit)(repertoire, start(emitter, repertoire), jax.random.key(2))
  chosen = np.where(info["note"]["coin"], info["parents"][:, 0], info["parents"][:, 1])
  np.testing.assert_array_equal(children["w"][:, 0], chosen)
  np.testing.assert_array_equal(info["note"]["both"]["sum"][:, 0], info["parents"].sum(axis=1))
