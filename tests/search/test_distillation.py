"""Distilling: Adam as it is written in the paper, in every space; validation decides; what cannot be is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes.space import coefficients, core, dense, dense_space
from cqd_jax.search import SearchContext
from cqd_jax.search.algorithm import NoTeachers
from cqd_jax.search.distillation import distill
from cqd_jax.search.gradient import cosine
from cqd_jax.tasks import Scored, TracedProblem

NAMES = ("left", "right")
GENERATOR = np.random.default_rng(0)
BASE, EXPERTS, TARGET = (GENERATOR.normal(size=shape).astype(np.float32) for shape in ((4, 3), (2, 4, 3), (4, 3)))


def loss(params, batch):
  """Of each task its half of the rows."""
  return jnp.square(params["kernel"] - TARGET).reshape(2, -1).mean(axis=1) + 0 * batch.sum()


PROBLEM = TracedProblem(
  lambda params, data: -loss(params, data)[:, None],
  {split: np.zeros(3, np.float32) for split in ("train", "validation", "test")},
  task_names=NAMES,
  loss=loss,
)


class Given(NoTeachers):
  """The signal above; and what was asked."""

  def __init__(self):
    self.asked = []

  def training_signal(self, *, labels, members):
    self.asked.append((labels, members))
    return PROBLEM.training_signal(())

  def average_of_swarm(self, space, size):
    return {"kernel": jnp.full((4, 3), float(size))}


def context(teachers=None, first=False):
  root = dense_space({"kernel": jnp.asarray(BASE)}, {"kernel": jnp.asarray(EXPERTS)})
  return SearchContext(root, lambda rank, make: make(), NAMES, 40, teachers or Given(), first=first)


def begun(algorithm):
  size = jax.tree.leaves(algorithm.space.initial)[0].shape[0]
  return algorithm.init(jax.random.key(0), algorithm.space.initial, Scored(np.zeros((size, 2, 5), np.float32)))


def go_on(algorithm, state, means, ask=None):
  """One round for each of the means that the problem would give; what was asked."""
  asked = []
  for round_, mean in enumerate(means):
    child, info = (ask or algorithm.ask)(state, jax.random.key(round_))
    asked.append((jax.tree.map(lambda leaf: np.asarray(leaf[0]), child), info.note))
    state, metrics = algorithm.tell(state, child, Scored(jnp.full((1, 2, 5), mean, jnp.float32)), info)
  return state, asked, metrics


def adam(weights, rates):
  """Kingma & Ba 2015 with a gradient of norm at most 1, in float64."""
  weights, first, second = weights.astype(np.float64), 0.0, 0.0
  for step, rate in enumerate(rates, start=1):
    gradient = 2 * (weights - TARGET) / 6 / 2  # the mean over 6 entries of a task, each task counts half
    gradient = gradient / max(1.0, np.linalg.norm(gradient))
    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    weights = weights - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
  return weights


def test_the_best_scale_is_taught_by_adam():
  algorithm = distill(context(), scales=(0.5, 1.0), steps=5, validate_every=3, learning_rate=0.1)
  assert algorithm.budget == 2 + 2
  state, asked, metrics = go_on(algorithm, begun(algorithm), [0.5, 0.2, 0.7, 0.6], jax.jit(algorithm.ask))
  starts = [0.5 * EXPERTS.sum(axis=0), EXPERTS.sum(axis=0)]
  for (child, note), start in zip(asked, starts, strict=False):
    np.testing.assert_allclose(child["kernel"], start, rtol=1e-6)
    assert note["steps"].tolist() == [0]
  rate = cosine(0.1, 5, 10)
  rates = [float(rate(jnp.int32(step))) for step in range(5)]
  for (child, note), taken in zip(asked[2:], (3, 5), strict=True):  # the sixth step would be one too many
    np.testing.assert_allclose(BASE + child["kernel"], adam(BASE + starts[0], rates[:taken]), rtol=1e-4, atol=1e-5)
    assert note["steps"].tolist() == [taken]
    assert note["loss"].shape == (1, 2)
  population = algorithm.population(state)
  np.testing.assert_array_equal(population.genotypes["kernel"][0], asked[2][0]["kernel"])  # .7: the best on validation
  assert population.identities.tolist() == [2 + 2]
  assert population.chosen == {"steps": 3.0}
  assert float(metrics["best_mean"]) == pytest.approx(0.7)


def test_failures_are_never_the_best():
  algorithm = distill(context(), start="base", steps=4, validate_every=1)
  state, asked, _ = go_on(algorithm, begun(algorithm), [np.nan, 0.1, np.nan, 0.05, np.nan])
  np.testing.assert_array_equal(asked[0][0]["kernel"], np.zeros((4, 3)))
  population = algorithm.population(state)
  np.testing.assert_array_equal(population.genotypes["kernel"][0], asked[1][0]["kernel"])
  assert np.asarray(population.scores).tolist() == [[np.float32(0.1)] * 2]


@pytest.mark.parametrize(
  "space", [dense, functools.partial(core, rank=0), functools.partial(core, rank=2, share_base=True), coefficients]
)
def test_in_every_space_the_losses_fall(space):
  algorithm = distill(context(), genotype=space, scales=(0.3,), steps=60, validate_every=30, learning_rate=0.05)
  state, asked, _ = go_on(algorithm, begun(algorithm), [0.0, 0.1, 0.2], jax.jit(algorithm.ask))
  (_, _), (_, first), (_, second) = asked
  assert (np.asarray(second["loss"]) < np.asarray(first["loss"])).all()
  whole = algorithm.space.materialize(algorithm.space.as_scored(algorithm.population(state).genotypes))
  assert jax.tree.leaves(whole)[0].dtype == jnp.float32


def test_the_swarm_may_be_where_it_begins():
  teachers = Given()
  algorithm = distill(context(teachers), start="average", labels="experts", steps=1)
  _, asked, _ = go_on(algorithm, begun(algorithm), [0.0])
  np.testing.assert_array_equal(asked[0][0]["kernel"], np.full((4, 3), 5.0))
  assert teachers.asked == [("experts", 8)]


@pytest.mark.parametrize(
  ("settings", "first", "message"),
  [
    ({"labels": "nobody"}, False, "labels: expected one of experts, swarm, references, got 'nobody'"),
    ({"start": "zero"}, False, "start: expected one of task_arithmetic, base, best, average, got 'zero'"),
    ({"steps": 0}, False, "steps: expected at least 1, got 0"),
    ({"members": 0}, False, "members: expected at least 1, got 0"),
    ({"learning_rate": 0.0}, False, "learning_rate: expected more than 0, got 0.0"),
    ({"scales": ()}, False, "scales: expected at least one"),
    ({}, True, "the swarm is what the first method of a run finds, and this is the first"),
    ({"labels": "experts", "start": "best"}, True, "labels, start: the swarm is"),
  ],
)
def test_what_cannot_be_is_refused_by_name(settings, first, message):
  with pytest.raises(ValueError, match=message):
    distill(context(first=first), **settings)
