"""Where parents come from, turn by turn: the three schedules by hand, and one of the test's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.archive import CyclingRepertoire, Grid, uniform_sampling
from cqd_jax.operators import linear_merge
from cqd_jax.search import CycleQDEmitter
from cqd_jax.search.schedules import SCHEDULES, cycle, fixed, num_distinct, round_robin

GRID = Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(4, 4, 4))
TURNS = {
  "cycle": [[0] * 5, [1] * 5, [2] * 5, [0] * 5],
  "fixed": [[0] * 5] * 4,
  "round_robin": [[0, 1, 2, 0, 1], [1, 2, 0, 1, 2], [2, 0, 1, 2, 0], [0, 1, 2, 0, 1]],
}


def mirrored(turn, batch_size, num_tasks):
  """The first half from archive t, the rest from the last archive."""
  first = jnp.arange(batch_size) < batch_size // 2
  return jnp.where(first, turn % num_tasks, num_tasks - 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_names_an_archive_for_each_child(name):
  schedule = jax.jit(SCHEDULES[name], static_argnums=(1, 2))
  for turn, archives in enumerate(TURNS[name]):
    found = schedule(jnp.int32(turn), 5, 3)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, archives)


def test_from_how_many_archives_a_batch_draws():
  assert [num_distinct(schedule, 5, 3) for schedule in (cycle, fixed, round_robin, mirrored)] == [1, 1, 3, None]
  assert num_distinct(round_robin, 2, 3) == 2
  assert num_distinct(functools.partial(cycle), 5, 3) is None


def repertoire_of(num):
  """Individuals whose only weight is their identity; each in its own cells."""
  scores = np.random.default_rng(0).uniform(size=(num, 3))
  return CyclingRepertoire.init({"w": jnp.arange(num, dtype=jnp.float32)[:, None]}, scores, GRID)


def emit(schedule, batch_size, iteration, repertoire):
  emitter = CycleQDEmitter(
    batch_size=batch_size, crossover=functools.partial(linear_merge, std=0.0), schedule=schedule, rule=uniform_sampling
  )
  scores = repertoire.scores
  state = emitter.init(jax.random.key(0), repertoire, repertoire.genotypes, scores, scores, {})
  return jax.jit(emitter.emit)(repertoire, state.replace(iteration=jnp.int32(iteration)), jax.random.key(batch_size))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("iteration", [1])
def test_a_function_is_as_good_as_its_name(name, iteration):
  repertoire = repertoire_of(20)
  by_name, by_function = (emit(each, 5, iteration, repertoire) for each in (name, SCHEDULES[name]))
  jax.tree.map(np.testing.assert_array_equal, by_function, by_name)
  np.testing.assert_array_equal(by_name[1]["archive"], TURNS[name][iteration])


@pytest.mark.parametrize(("batch_size", "iteration"), [(1, 1), (2, 0), (7, 1), (64, 0)])
def test_of_a_schedule_of_your_own_each_child_has_parents_from_its_archive(batch_size, iteration):
  repertoire = repertoire_of(60)
  children, info = emit(mirrored, batch_size, iteration, repertoire)
  expected = [iteration] * (batch_size // 2) + [2] * (batch_size - batch_size // 2)
  np.testing.assert_array_equal(info["archive"], expected)
  members = [set(np.asarray(row)[np.asarray(row) >= 0].tolist()) for row in repertoire.slots]
  identity = np.asarray(repertoire.lineage.identity)
  for parents, archive, child in zip(info["parents"], info["archive"], children["w"], strict=True):
    first, second = (int(np.flatnonzero(identity == parent)[0]) for parent in parents)
    assert first != second
    assert {first, second} <= members[int(archive)]
    np.testing.assert_allclose(child[0], (float(parents[0]) + float(parents[1])) / 2)
  if batch_size == 64:  # pairs are drawn for each child: that all 32 of one archive agree has no chance
    assert len({tuple(parents) for parents in np.asarray(info["parents"]).tolist()}) > 16


def test_a_custom_schedule_draws_as_the_same_one_by_name_would():
  """The same pairs of one archive are as likely, whichever way they are drawn: here over 4,000 draws."""
  repertoire = repertoire_of(6)

  def own(turn, batch_size, num_tasks):
    return cycle(turn, batch_size, num_tasks)

  shares = []
  for schedule in (own, "cycle"):
    _, info = emit(schedule, 4000, 1, repertoire)
    shares.append(np.bincount(np.asarray(info["parents"]).reshape(-1), minlength=6) / 8000)
  # A share of s is off by sqrt(s / 8000) < 0.008 in the mean; the keys are fixed.
  np.testing.assert_allclose(*shares, atol=0.04)
