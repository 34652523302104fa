"""Children that take gradient steps: which of them, how far, and with what noted; in a run, and refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.archive import CyclingRepertoire, Grid
from cqd_jax.genotypes.space import dense_space
from cqd_jax.search import CycleQD, SearchContext
from cqd_jax.search.algorithm import NoTeachers
from cqd_jax.search.gradient_emitter import GradientEmitter, gradient
from cqd_jax.tasks import Scored, TrainingSignal

GENERATOR = np.random.default_rng(0)
BASE, EXPERTS, TARGETS = (GENERATOR.normal(size=shape).astype(np.float32) for shape in ((5,), (2, 5), (2, 5)))


class Given(NoTeachers):
  def training_signal(self, *, labels, members):
    def loss(params, batch):
      return jnp.square(params["w"][None] - batch).sum(axis=1)

    return TrainingSignal(jnp.asarray(TARGETS), lambda key, data: data, loss)


def space():
  return dense_space({"w": jnp.asarray(BASE)}, {"w": jnp.asarray(EXPERTS)})


def first_parent(key, first, second):
  return first


def emitted(**settings):
  emitter = GradientEmitter(
    space=space(), teachers=Given(), batch_size=5, crossover=first_parent, learning_rate=0.01, **settings
  )
  scores = np.array([[0.9, 0.2], [0.3, 0.8]], np.float32)
  grid = Grid(lower=[0.0] * 2, upper=[1.0] * 2, shape=(3, 3))
  repertoire, state, _ = CycleQD(None, emitter).init_ask_tell(
    {"w": jnp.asarray(EXPERTS)}, scores, grid, jax.random.key(0)
  )
  assert isinstance(repertoire, CyclingRepertoire)
  children, info = jax.jit(emitter.emit)(repertoire, state, jax.random.key(1))
  return np.asarray(children["w"]), jax.tree.map(np.asarray, info)


def after_steps(child, weights, steps):
  """Adam with a gradient of norm at most 1, in float64."""
  params, first, second = (BASE + child).astype(np.float64), 0.0, 0.0
  for step in range(1, steps + 1):
    slope = (weights[:, None] * 2 * (params - TARGETS)).sum(axis=0)
    slope = slope / max(1.0, np.linalg.norm(slope))
    first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
    params = params - 0.01 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
  return params - BASE


@pytest.mark.parametrize(("follow", "share", "count"), [("simplex", 0.6, 3), ("active", 1.0, 5)])
def test_children_go_down_their_own_mixture_of_losses(follow, share, count):
  children, info = emitted(steps=3, share=share, follow=follow, side_by_side=2)
  weights = info["note"]["task_weights"]
  parents = EXPERTS[info["parents"][:, 0]]
  for child in range(5):
    if child < count:
      assert weights[child].sum() == pytest.approx(1)
      np.testing.assert_allclose(children[child], after_steps(parents[child], weights[child], 3), rtol=1e-4, atol=1e-5)
    else:
      np.testing.assert_array_equal(children[child], parents[child])
      assert np.isnan(weights[child]).all()
      assert np.isnan(info["note"]["loss"][child]).all()
  if follow == "active":
    np.testing.assert_array_equal(weights, np.eye(2)[info["archive"]])
  else:
    assert len(np.unique(weights[:count, 0])) == count


def test_as_a_method_it_brings_the_archives_closer_to_the_tasks():
  context = SearchContext(space(), lambda rank, make: make(), ("one", "other"), 40, Given())
  algorithm = gradient(context, steps=20, learning_rate=0.05)
  assert algorithm.variation == "20 gradient steps"
  score = jax.jit(
    lambda w: jnp.exp(-jnp.square(BASE[None, None] + w[:, None] - TARGETS[None]).mean(axis=2))[:, :, None]
  )
  state = algorithm.init(jax.random.key(0), algorithm.space.initial, Scored(score(EXPERTS)))
  began = np.asarray(score(EXPERTS))[..., 0].max(axis=0)
  ask, tell = jax.jit(algorithm.ask), jax.jit(algorithm.tell)
  for round_ in range(10):
    children, info = ask(state, jax.random.key(round_))
    state, _ = tell(state, children, Scored(score(children["w"])), info)
  assert (algorithm.population(state).scores.max(axis=0) > began + 0.1).all()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"steps": 0}, "steps, side_by_side: expected at least 1"),
    ({"learning_rate": 0.0}, "learning_rate: expected more than 0"),
    ({"share": 0.0}, "share: expected more than 0 and at most 1, got 0.0"),
    ({"follow": "nobody"}, "follow: expected one of simplex, active, got 'nobody'"),
    ({"labels": "swarm"}, "labels: expected experts or references, got 'swarm'"),
  ],
)
def test_what_cannot_be_is_refused_by_name(settings, message):
  context = SearchContext(space(), lambda rank, make: make(), ("one", "other"), 40, Given())
  with pytest.raises(ValueError, match=message):
    gradient(context, **settings)
