"""Every method of a configuration through the one protocol, on a toy whose optimum is known: models near targets."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.emitters.multi_emitter import MultiEmitter
from qdax.core.emitters.mutation_operators import isoline_variation
from qdax.core.emitters.standard_emitters import MixingEmitter

from cqd_jax.archive import Centroids, Grid
from cqd_jax.config.plugs import Plug, PlugError, resolve
from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.space import core_space, dense_space, population_size
from cqd_jax.operators import gaussian_mutation
from cqd_jax.operators.crossover import Child, linear_crossover
from cqd_jax.search import CycleQDEmitter, as_mutation_fn, as_variation_fn
from cqd_jax.search.algorithm import Algorithm, Info, Population, SearchContext, archives_of, space_of
from cqd_jax.search.vector_algorithm import VectorAlgorithm
from cqd_jax.search.vector_search import random_search
from cqd_jax.tasks import Scored, TracedProblem, task_scores

pytestmark = pytest.mark.usefixtures("qdax_ranks")

NAMES = ("left", "right")
NUM_SAMPLES = 3


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE = {"Dense_0": {"kernel": draw(0, 4, 3), "bias": draw(1, 3)}}


def experts(num=2):
  """Task vectors; that of each task's expert comes close to its target, and is far from the other's."""
  return {"Dense_0": {"kernel": draw(2, num, 4, 3), "bias": draw(3, num, 3)}}


TARGETS = jax.tree.map(lambda leaf, change: leaf[None] + 0.9 * change, BASE, experts())
SHARES = jnp.array([0.5, 1.0, 1.5])


def nearness(params, data):
  """One minus the squared distance to each task's target, in units of that between the two; 3 samples, and 2."""
  squares = jax.tree.map(lambda leaf, target: jnp.square(leaf[None] - target).reshape(2, -1).sum(axis=1), params, data)
  scale = sum(jax.tree.leaves(jax.tree.map(lambda target: jnp.square(target[0] - target[1]).sum(), data)))
  near = 1 - sum(jax.tree.leaves(squares)) / scale
  return [near[0] * SHARES, near[1] * SHARES[:2]]


PROBLEM = TracedProblem(nearness, {"validation": TARGETS, "test": TARGETS}, task_names=NAMES, batch_size=8)


def keep(rank, make):
  return make()


def context(num_experts=2, budget=40, in_core=False):
  root = dense_space(jax.tree.map(jnp.asarray, BASE), jax.tree.map(jnp.asarray, experts(num_experts)))
  if in_core:
    root = core_space(CoreBasis.from_experts(root.base, root.experts))
  return SearchContext(root, keep, NAMES, budget)


def mixing(context, space, *, batch_size: int = 8, share: float = 0.5):
  """QDax's own emitter with its own variation and our mutation."""
  return MixingEmitter(
    mutation_fn=as_mutation_fn(functools.partial(gaussian_mutation, std=0.05)),
    variation_fn=functools.partial(isoline_variation, iso_sigma=0.05, line_sigma=0.2),
    variation_percentage=share,
    batch_size=batch_size,
  )


def our_crossover_in_qdaxs(context, space):
  """QDax's emitter with our crossover, whose notes it has no place for."""
  return MixingEmitter(
    mutation_fn=None,
    variation_fn=as_variation_fn(functools.partial(linear_crossover, std=0.1)),
    variation_percentage=1.0,
    batch_size=8,
  )


def several(context, space):
  """Ours and QDax's side by side; each says something of its own children only."""
  ours = CycleQDEmitter(batch_size=4, crossover=functools.partial(linear_crossover, std=0.1))
  return MultiEmitter((ours, mixing(context, space, batch_size=4)))


def elementwise(key, first, second):
  """The larger of each pair of weights."""
  return Child(jax.tree.map(jnp.maximum, first, second), {})


def inner(key, first, second):
  """The mean, of which it says that it needs inner products."""
  return Child(jax.tree.map(lambda one, other: (one + other) / 2, first, second), {})


def unmarked(key, first, second):
  """The first parent; nothing is said of where that has a meaning."""
  return first


elementwise.frame, inner.frame = "elementwise", "inner_product"


@pytest.fixture(autouse=True)
def module(monkeypatch):
  own = types.ModuleType("own_search")
  for function in (mixing, our_crossover_in_qdaxs, several, elementwise, inner, unmarked):
    setattr(own, function.__name__, function)
  monkeypatch.setitem(sys.modules, "own_search", own)


def make(use, making=None, **settings):
  return resolve("methods", Plug(use, settings), use)(making or context())


COEFFICIENTS = {"use": "coefficients", "granularity": "kernel", "starts": [0.3]}
METHODS = {
  "cycleqd": ("cycleqd", {}),
  "cycleqd, svd": ("cycleqd", {"mutation": {"use": "svd", "max_scale": 2}, "batch_size": 3}),
  "cycleqd, gaussian, round robin": (
    "cycleqd",
    {"mutation": {"use": "gaussian", "std": 0.05}, "schedule": "round_robin", "selection": "reference_elite"},
  ),
  "cycleqd, cores": ("cycleqd", {"genotype": {"use": "core", "rank": 0}, "cells": {"use": "cvt", "num_cells": 9}}),
  "cycleqd, coefficients": ("cycleqd", {"genotype": COEFFICIENTS, "schedule": "fixed", "selection": "uniform"}),
  "random_search": ("random_search", {}),
  "cma_es": ("cma_es", {"genotype": {"use": "coefficients", "granularity": "kernel"}}),
  "nsga2": ("nsga2", {"population_size": 6, "genotype": COEFFICIENTS}),
  "cma_es, restarts": ("cma_es", {"restarts": True}),
  "lorahub": ("lorahub", {}),
  "task_arithmetic": ("task_arithmetic", {}),
  "ties": ("ties", {"densities": [0.5, 1.0], "scales": [0.8, 1.0, 1.2]}),
  "mixing": ("emitter", {"emitter": "own_search:mixing"}),
  "mixing, settings": ("emitter", {"emitter": {"use": "own_search:mixing", "batch_size": 5, "share": 1.0}}),
  "mixing, ours": ("emitter", {"emitter": "own_search:our_crossover_in_qdaxs", "genotype": "core"}),
  "several": ("emitter", {"emitter": "own_search:several", "cells": {"use": "grid", "shape": 6}}),
}
ARCHIVES = {name for name, (use, _) in METHODS.items() if use in ("cycleqd", "emitter")}


@functools.cache
def algorithm_of(name):
  """The algorithm of a case, and its functions compiled: tests share them."""
  use, settings = METHODS[name]
  algorithm = make(use, context(budget=96), **settings)
  return algorithm, jax.jit(algorithm.ask), jax.jit(algorithm.tell)


def score(algorithm, population):
  space = algorithm.space
  return PROBLEM.score("validation", space.as_scored(population), space.scored_in).with_scores()


def told(scored):
  """As the loop tells it: scores in float32."""
  return scored._replace(scores=np.asarray(scored.scores, np.float32))


def begin(algorithm):
  initial = algorithm.space.initial
  return algorithm.init(jax.random.key(1), initial, told(score(algorithm, initial)))


def iterate(algorithm, state, num, seed=0, spoil=None, compiled=None):
  """Some iterations under `jax.jit`; returns the state, all that was asked, and the figures."""
  ask, tell = compiled or (jax.jit(algorithm.ask), jax.jit(algorithm.tell))
  asked = []
  for turn in range(num):
    children, info = ask(state, jax.random.fold_in(jax.random.key(seed), turn))
    scored = score(algorithm, children)
    if spoil is not None:
      scored = scored._replace(values=np.where(spoil(turn, population_size(children)), np.nan, scored.values))
      scored = scored._replace(scores=task_scores(scored.values))
    state, metrics = tell(state, children, told(scored), info)
    asked.append((children, info, scored))
  return state, asked, metrics


def shapes(tree):
  return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_the_protocol(name):
  algorithm, *compiled = algorithm_of(name)
  assert isinstance(algorithm, Algorithm)
  size = algorithm.batch_size
  initial = algorithm.space.initial
  num_initial = population_size(initial)
  state = begin(algorithm)
  assert name not in ARCHIVES or isinstance(algorithm.population(state), Population)
  after, asked, metrics = iterate(algorithm, state, 3, compiled=compiled)

  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert shapes(after) == shapes(state)  # so that a scan can carry it
  assert all(np.ndim(figure) <= 1 for figure in metrics.values())
  for children, info, _ in asked:
    assert jax.tree.structure(children) == jax.tree.structure(initial)
    assert shapes(children) == jax.tree.map(lambda leaf: ((size, *leaf.shape[1:]), leaf.dtype), initial)
    assert isinstance(info, Info)
    assert info.parents is None or info.parents.shape == (size, 2)
    assert info.archive is None or info.archive.shape == (size,)
    assert all(leaf.shape[0] == size for leaf in jax.tree.leaves(dict(info.note)))

  population = algorithm.population(after)
  members = population_size(population.genotypes)
  assert np.shape(population.values) == (members, 2, NUM_SAMPLES)
  assert np.shape(population.scores) == (members, 2)
  assert np.shape(population.identities) == (members,)
  np.testing.assert_allclose(task_scores(np.asarray(population.values)), population.scores, rtol=1e-5, atol=1e-5)
  # Whoever is offered is who was asked under that identity, with the values that it was told.
  everyone = jax.tree.map(lambda *leaves: np.concatenate(leaves), initial, *(children for children, *_ in asked))
  values = np.concatenate([score(algorithm, initial).values, *(scored.values for *_, scored in asked)])
  identities = np.asarray(population.identities)
  assert len(set(identities.tolist())) == members
  np.testing.assert_array_equal(population.values, values[identities])
  jax.tree.map(
    lambda own, leaf: np.testing.assert_allclose(own, leaf[identities], rtol=1e-6), population.genotypes, everyone
  )
  assert identities.min() >= (0 if name in ARCHIVES else num_initial)
  assert (archives_of(algorithm, after) is not None) == (name in ARCHIVES)
  assert space_of(algorithm, context().root) is algorithm.space


@pytest.mark.parametrize("name", ["cycleqd", "cycleqd, coefficients", "cma_es", "nsga2", "task_arithmetic", "several"])
def test_a_state_goes_on_to_the_bit_from_its_leaves_alone(name):
  first, *compiled = algorithm_of(name)
  halfway, _, _ = iterate(first, begin(first), 2, compiled=compiled)
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(halfway)]
  expected, asked, _ = iterate(first, halfway, 2, seed=5, compiled=compiled)

  use, settings = METHODS[name]
  again = make(use, context(budget=96), **settings)  # another session: nothing of the first is left but numbers
  restored = jax.tree.unflatten(jax.tree.structure(begin(again)), [jnp.asarray(leaf) for leaf in leaves])
  found, asked_again, _ = iterate(again, restored, 2, seed=5)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found), jax.tree.leaves(expected))
  for (children, *_), (others, *_) in zip(asked, asked_again, strict=True):
    jax.tree.map(np.testing.assert_array_equal, others, children)


@pytest.mark.parametrize("name", ["cycleqd", "cycleqd, cores", "cma_es", "nsga2", "task_arithmetic", "several"])
def test_a_method_runs_whole_inside_a_scan(name):
  algorithm, *_ = algorithm_of(name)
  space = algorithm.space

  def one(state, key):
    children, info = algorithm.ask(state, key)
    values = PROBLEM.traced_values("validation", space.as_scored(children), space.scored_in)
    return algorithm.tell(state, children, Scored(values), info)

  state, metrics = jax.jit(lambda state, keys: jax.lax.scan(one, state, keys))(
    begin(algorithm), jax.random.split(jax.random.key(0), 4)
  )
  assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(metrics))
  assert np.isfinite(algorithm.population(state).scores).all()


@pytest.mark.parametrize("name", METHODS)
def test_what_failed_ranks_last_and_never_wins(name):
  """Half of the children fail, among them whoever would be best of each batch."""
  algorithm, *compiled = algorithm_of(name)

  def spoil(turn, size):
    return (np.arange(size) % 2 == turn % 2)[:, None, None]

  state, asked, metrics = iterate(algorithm, begin(algorithm), 4, spoil=spoil, compiled=compiled)
  failed = np.concatenate([np.isnan(scored.scores).all(axis=1) for *_, scored in asked])
  assert 0 < failed.sum() < len(failed)
  population = algorithm.population(state)
  num_initial = population_size(algorithm.space.initial)
  children = np.asarray(population.identities) - num_initial
  means = np.asarray(population.scores).mean(axis=1)
  for child, mean in zip(children, means, strict=True):
    assert child < 0 or failed[child] == np.isnan(mean)
  if name in ARCHIVES:
    assert not np.isnan(means).any()
    assert int(archives_of(algorithm, state).num_rejected) == failed.sum()
    best = int(archives_of(algorithm, state).best().lineage.identity)
    assert best < num_initial or not failed[best - num_initial]
  else:
    assert np.isfinite(means).any()
    told_means = np.concatenate([scored.scores for *_, scored in asked]).mean(axis=1)
    np.testing.assert_allclose(metrics["best_mean"], np.nanmax(told_means), rtol=1e-5)


def best_mean(scores):
  return float(np.nanmax(np.asarray(scores).mean(axis=1)))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random_search"])
def test_a_search_finds_better_than_the_experts(name):
  """Between the targets the mean is 1 - 1/4 times the mean share; an expert by itself has about half."""
  algorithm, *compiled = algorithm_of(name)
  num = min(12, algorithm.budget) if hasattr(algorithm, "budget") else 12
  state, _, _ = iterate(algorithm, begin(algorithm), num, compiled=compiled)
  own = best_mean(score(algorithm, algorithm.space.experts).scores)
  assert best_mean(algorithm.population(state).scores) > own + 0.1


def test_random_coefficients_are_drawn_between_the_bounds():
  algorithm = make("random_search", low=0.2, high=0.4, batch_size=6)
  _, asked, _ = iterate(algorithm, begin(algorithm), 3)
  drawn = np.concatenate([children for children, *_ in asked])
  assert drawn.shape == (18, 2, 1)
  assert ((drawn >= 0.2) & (drawn <= 0.4)).all()
  assert np.ptp(drawn) > 0.1


def test_a_search_over_vectors_offers_what_its_budget_has():
  """Of the last batch only a part is scored: the rest is told as failed, and is not offered."""
  algorithm = make("random_search", context(budget=10), batch_size=4)
  state, asked, _ = iterate(algorithm, begin(algorithm), 3)
  population = algorithm.population(state)
  np.testing.assert_array_equal(population.identities, 2 + np.arange(10))
  np.testing.assert_array_equal(population.genotypes, np.concatenate([children for children, *_ in asked])[:10])
  assert len(algorithm.population(begin(algorithm)).identities) == 0


def test_of_the_initial_population_a_vector_search_has_the_experts_only():
  algorithm = make("nsga2", genotype=COEFFICIENTS)
  assert algorithm.space.others == ()
  assert population_size(algorithm.space.initial) == 2
  assert make("cycleqd", genotype=COEFFICIENTS).space.others == ("0.3 x the experts' sum",)


def test_task_arithmetic_offers_the_best_scale():
  scales = [0.2, 0.5, 0.7, 1.0]
  algorithm = make("task_arithmetic", scales=scales)
  assert (algorithm.batch_size, algorithm.budget) == (1, 4)
  state, asked, _ = iterate(algorithm, begin(algorithm), 4)
  expected = []
  for scale, (children, info, scored) in zip(scales, asked, strict=True):
    np.testing.assert_allclose(info.note["scale"], [scale])
    jax.tree.map(
      lambda leaf, own, scale=scale: np.testing.assert_allclose(
        leaf[0], scale * np.float64(own).sum(axis=0), rtol=1e-5
      ),
      children,
      experts(),
    )
    expected.append(scored.scores.mean())
  best = int(np.argmax(expected))
  population = algorithm.population(state)
  assert population.chosen == {"scale": scales[best]}
  np.testing.assert_array_equal(population.identities, [2 + best])
  np.testing.assert_array_equal(population.values, asked[best][2].values)
  jax.tree.map(np.testing.assert_array_equal, population.genotypes, asked[best][0])


def test_the_best_scale_is_that_of_tasks_and_not_of_samples():
  """The first scale is better on the task with many samples, the second on the mean over tasks."""
  values = [[[0.9, 0.9, 0.9], [0.1, np.nan, np.nan]], [[0.6, 0.6, 0.6], [0.6, np.nan, np.nan]], [[np.nan] * 3] * 2]
  algorithm = make("task_arithmetic", scales=[0.1, 0.2, 0.3])
  state = begin(algorithm)
  for own in values:
    children, info = algorithm.ask(state, jax.random.key(0))
    state, _ = algorithm.tell(state, children, Scored(jnp.array([own], jnp.float32)), info)
  assert algorithm.population(state).chosen == {"scale": 0.2}
  with pytest.raises(ValueError, match="scales: expected at least one"):
    make("task_arithmetic", scales=[])


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({}, "expert_svd 0.3"),
    ({"mutation": {"use": "svd", "max_scale": 2}}, "svd 2"),
    ({"mutation": "none"}, ""),
    ({"genotype": "coefficients"}, "iso 0.15, line 0.3"),
    ({"genotype": "coefficients", "crossover": {"use": "line", "iso_sigma": 0.5}}, "iso 0.5, line 0.3"),
    ({"crossover": "own_search:unmarked", "mutation": {"use": "gaussian", "std": 0.1}}, "unmarked, gaussian 0.1"),
  ],
)
def test_what_happens_to_a_child_is_said(settings, said):
  assert make("cycleqd", **settings).variation == said


def test_the_note_of_a_crossover_is_told_of_each_child():
  algorithm = make("cycleqd", crossover={"use": "linear", "granularity": "kernel"}, batch_size=3)
  _, [(_, info, _)], _ = iterate(algorithm, begin(algorithm), 1)
  assert set(info.note) == {"weights"}
  assert info.note["weights"].shape == (3, 2, 2)
  np.testing.assert_allclose(np.asarray(info.note["weights"]).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
  ("num_experts", "mutation"), [(2, "expert_svd 0.3"), (3, "svd 2"), (1, "svd 2")], ids=["two", "three", "one"]
)
def test_experts_need_not_be_as_many_as_tasks(num_experts, mutation):
  making = context(num_experts)
  algorithm = make("cycleqd", making)
  assert algorithm.variation == mutation
  state, _, _ = iterate(algorithm, begin(algorithm), 2)
  assert int(archives_of(algorithm, state).num_offered) == num_experts + 8
  by_vectors = make("cma_es", making)
  assert by_vectors.space.initial.shape == (num_experts, num_experts, 1)
  iterate(by_vectors, begin(by_vectors), 2)


@pytest.mark.parametrize(
  ("num_experts", "settings", "message"),
  [
    (3, {"mutation": "expert_svd"}, "mutation: expert_svd .* as many experts as tasks; got 3 and 2"),
    (2, {"genotype": "coefficients", "mutation": "expert_svd"}, "mutation.* expert_svd"),
    (2, {"cells": {"use": "from_experts", "shape": 0}}, "cells: shape: expected at least one cell a dimension"),
    (2, {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    (2, {"flip_interval": 0}, "flip_interval: expected at least 1, got 0"),
    (2, {"genotype": {"use": "core", "rank": -1}}, "rank: expected at least 0, got -1"),
    (2, {"genotype": {"use": "coefficients", "granularity": "leaf"}}, "granularity: expected one of"),
  ],
)
def test_what_cannot_be_made_is_refused_by_name(num_experts, settings, message):
  settings = {**settings}
  if settings.get("mutation") == "expert_svd":
    settings["mutation"] = {"use": "expert_svd", "rate": 0.3}
  with pytest.raises(ValueError, match=message):
    make("cycleqd", context(num_experts), **settings)


@pytest.mark.parametrize(
  ("crossover", "genotype", "valid"),
  [
    ("elementwise", "dense", True),
    ("elementwise", "core", False),
    ("elementwise", "coefficients", False),
    ("inner", "dense", True),
    ("inner", "core", True),
    ("inner", "coefficients", False),
    ("unmarked", "dense", True),
    ("unmarked", "core", True),
    ("unmarked", "coefficients", True),
  ],
)
def test_an_operator_that_has_no_meaning_in_a_space_is_refused_before_anything_is_made(crossover, genotype, valid):
  settings = {"genotype": genotype, "crossover": f"own_search:{crossover}", "mutation": "none"}
  if valid:
    make("cycleqd", **settings)
    return
  with pytest.raises(ValueError, match=f"crossover.*{crossover}.*{genotype}"):
    make("cycleqd", **settings)
  if genotype == "core":  # also where the experts were read so
    with pytest.raises(ValueError, match=f"crossover.*{crossover}.*core"):
      make("cycleqd", context(in_core=True), **settings)


def test_an_operator_behind_settings_keeps_its_frame():
  bound = functools.partial(elementwise)
  making = context()
  with pytest.raises(ValueError, match=r"crossover.*elementwise.*core"):
    resolve("methods", Plug("cycleqd", {"genotype": "core"}), "here")(making, crossover=bound)


def test_dense_individuals_are_refused_where_experts_were_read_as_cores():
  with pytest.raises(ValueError, match="genotype: dense, but the experts of this run were read in core space"):
    make("cycleqd", context(in_core=True))


def test_a_search_over_vectors_is_of_arrays():
  space = context().root
  with pytest.raises(ValueError, match="genotype: expected coefficients, one array per individual, got dense"):
    make("cma_es", genotype="dense")
  with pytest.raises(ValueError, match="genotype: expected coefficients"):
    VectorAlgorithm(
      lambda size: random_search(size, batch_size=2, low=0.0, high=1.0), space=space, batch_size=2, budget=4
    )


def test_an_emitter_has_to_be_named():
  with pytest.raises(PlugError, match="emitter needs the setting 'emitter'"):
    make("emitter")


def test_cells_follow_from_the_experts_and_not_from_who_begins_beside_them():
  algorithm = make("cycleqd", genotype={"use": "coefficients", "starts": [0.1, 3.0]})
  cells = archives_of(algorithm, begin(algorithm)).cells
  own = score(algorithm, algorithm.space.experts).scores
  assert cells == Grid.from_experts(own.astype(np.float32))
  voronoi = make("cycleqd", cells={"use": "cvt", "num_cells": 5})
  assert isinstance(archives_of(voronoi, begin(voronoi)).cells, Centroids)


def test_a_population_that_failed_whole_is_refused():
  algorithm = make("cycleqd", cells="grid")
  initial = algorithm.space.initial
  values = np.full((2, 2, 3), np.nan, np.float32)
  with pytest.raises(ValueError, match="no individual of the initial population has finite scores"):
    algorithm.init(jax.random.key(0), initial, Scored(values, 0.0, task_scores(values).astype(np.float32)))
