"""A child whose evaluation failed ranks last in every search; a batch that failed whole teaches nothing."""

import functools
import importlib
import itertools
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.emitters.cma_improvement_emitter import CMAImprovementEmitter
from qdax.core.emitters.cma_mega_emitter import CMAMEGAEmitter
from qdax.core.emitters.cma_opt_emitter import CMAOptimizingEmitter
from qdax.core.emitters.cma_pool_emitter import CMAPoolEmitter
from qdax.core.emitters.cma_rnd_emitter import CMARndEmitter
from qdax.core.emitters.multi_emitter import MultiEmitter
from qdax.core.emitters.mutation_operators import isoline_variation
from qdax.core.emitters.omg_mega_emitter import OMGMEGAEmitter
from qdax.core.emitters.standard_emitters import MixingEmitter
from qdax.core.neuroevolution.buffers.buffer import QDTransition

from cqd_jax.archive import Grid
from cqd_jax.operators import gaussian_mutation, linear_merge
from cqd_jax.search import CycleQD, CycleQDEmitter, PerArchiveEmitter
from cqd_jax.search.vector_search import cma_es, nsga2, random_search

pytestmark = pytest.mark.usefixtures("qdax_ranks")

K, D = 2, 4
GRID = Grid(lower=[0.0] * K, upper=[1.0] * K, shape=(5, 5))
CENTROIDS = jnp.asarray(GRID.centroids(0))
FAILURES = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf}
isoline = functools.partial(isoline_variation, iso_sigma=0.05, line_sigma=0.1)


def scores_of(genotypes):
  genotypes = np.asarray(genotypes)
  return np.exp(-np.stack([((genotypes - 0.3) ** 2).sum(-1), ((genotypes + 0.3) ** 2).sum(-1)], -1)).astype(np.float32)


def gradients(genotypes, key=None):
  """A scoring function in QDax's manner, with gradients of the scores, `[P, D, K]`."""
  del key

  def score(genotype):
    return jnp.stack([jnp.exp(-((genotype - 0.3) ** 2).sum()), jnp.exp(-((genotype + 0.3) ** 2).sum())])

  scores = jax.vmap(score)(genotypes)
  slopes = jnp.moveaxis(jax.vmap(jax.jacrev(score))(genotypes), 1, 2)
  own = {"gradients": slopes, "normalized_grads": slopes / jnp.linalg.norm(slopes, axis=1, keepdims=True)}
  return scores[:, 0], scores[:, 1:], own


def cma(kind, batch_size=6):
  return kind(batch_size=batch_size, genotype_dim=D, centroids=CENTROIDS, sigma_g=0.3, max_count=None)


def mixing():
  return MixingEmitter(mutation_fn=lambda x, key: x, variation_fn=isoline, variation_percentage=1.0, batch_size=4)


def cma_mega():
  return CMAMEGAEmitter(
    scoring_function=gradients, batch_size=6, learning_rate=0.1, num_descriptors=K - 1, centroids=CENTROIDS, sigma_g=0.1
  )


EMITTERS = {
  "mixing": mixing,
  "CMA-opt": lambda: cma(CMAOptimizingEmitter),
  "CMA-imp": lambda: cma(CMAImprovementEmitter),
  "CMA-rnd": lambda: cma(CMARndEmitter),
  "CMA-pool": lambda: CMAPoolEmitter(num_states=2, emitter=cma(CMAImprovementEmitter)),
  "CMA-MEGA": cma_mega,
  "OMG-MEGA": lambda: OMGMEGAEmitter(batch_size=6, sigma_g=0.1, num_descriptors=K - 1, centroids=CENTROIDS),
  "multi": lambda: MultiEmitter((cma(CMARndEmitter), mixing())),
  "CycleQD": lambda: CycleQDEmitter(
    batch_size=6,
    crossover=functools.partial(linear_merge, std=0.3),
    mutation=functools.partial(gaussian_mutation, std=0.1),
  ),
}


class Compiled:
  """`CycleQD` whose ask and tell are compiled once."""

  def __init__(self, emitter):
    self.emitter = emitter
    loop = CycleQD(None, PerArchiveEmitter(emitter))
    self.batch_size = loop._emitter.batch_size
    self.init_ask_tell, self.ask, self.tell = loop.init_ask_tell, jax.jit(loop.ask), jax.jit(loop.tell)


@functools.cache
def start(make):
  """The loop of an emitter with what it begins with, once for all tests: nothing of it is ever changed."""
  loop = Compiled(make())
  genotypes = 0.1 * jnp.arange(4.0)[:, None] + jnp.linspace(0.0, 0.05, D)[None]
  extra_scores = gradients(genotypes)[2]
  return loop, *loop.init_ask_tell(genotypes, scores_of(genotypes), GRID, jax.random.key(0), extra_scores=extra_scores)


def step(loop, repertoire, state, turn, failed, value=np.nan):
  """One iteration in which the children `failed` got `value` for a score, and NaN for all that comes with it."""
  genotypes, info = loop.ask(repertoire, state, jax.random.key(turn))
  scores, extra_scores = scores_of(genotypes), jax.jit(gradients)(genotypes)[2]
  scores[failed, turn % K] = value
  extra_scores = {name: leaf.at[jnp.asarray(failed, int)].set(jnp.nan) for name, leaf in extra_scores.items()}
  repertoire, state, _ = loop.tell(genotypes, scores, repertoire, state, extra_scores=extra_scores, extra_info=info)
  return genotypes, repertoire, state


def floats(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def comparable(states):
  return jax.tree.map(
    lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, states
  )


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", EMITTERS)
def test_failures_do_not_reach_what_is_emitted(name, failure):
  loop, repertoire, state, _ = start(EMITTERS[name])
  for turn in range(2 * K):
    genotypes, repertoire, state = step(loop, repertoire, state, turn, [1, 3], FAILURES[failure])
    assert np.isfinite(np.asarray(genotypes)).all()
    assert not any(np.isnan(leaf).any() for leaf in floats(state))
  assert int(repertoire.num_rejected) == 2 * 2 * K


@pytest.mark.parametrize("name", EMITTERS)
def test_from_a_batch_that_failed_whole_nothing_is_learned(name):
  loop, repertoire, state, _ = start(EMITTERS[name])
  _, repertoire, state = step(loop, repertoire, state, 0, [])
  _, after, learned = step(loop, repertoire, state, 1, list(range(loop.batch_size)))
  jax.tree.map(np.testing.assert_array_equal, *map(comparable, (learned.states, state.states)))
  assert int(learned.iteration) == int(state.iteration) + 1
  np.testing.assert_array_equal(after.scores, repertoire.scores)
  np.testing.assert_array_equal(after.slots, repertoire.slots)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", ["CMA-opt", "CMA-imp", "CMA-rnd"])
@pytest.mark.parametrize("turns", [0, 2 * K])
def test_a_failed_child_is_the_last_by_which_cma_learns(name, failure, turns):
  """The order in which children were ranked is found from the mean that they moved."""
  loop, repertoire, state, _ = start(EMITTERS[name])
  for turn in range(turns):
    _, repertoire, state = step(loop, repertoire, state, turn, [])
  for failed in range(6):
    genotypes, _, learned = step(loop, repertoire, state, turns, [failed], FAILURES[failure])
    mean = np.asarray(learned.states.cmaes_state.mean)[0]
    weights, wide = np.asarray(loop.emitter._cmaes._weights, np.float64), np.asarray(genotypes, np.float64)
    orders = np.array(list(itertools.permutations(range(6))))
    distances = np.abs(np.einsum("p,opd->od", weights, wide[orders]) - mean).max(axis=1)
    if distances.min() < 1e-5:  # else it began anew
      assert orders[np.argmin(distances)][-1] == failed


@pytest.fixture
def pga_me(monkeypatch):
  """QDax's module, which needs a version of brax that nobody has any more, for the name of a type."""
  for name in ("v1", "v1.envs", "v1.envs.base_env"):
    module = types.ModuleType(f"qdax.tasks.brax.{name}")
    module.QDEnv = object
    monkeypatch.setitem(sys.modules, module.__name__, module)
  return importlib.import_module("qdax.core.emitters.pga_me_emitter")


@pytest.mark.parametrize("turn", [0, 1])
def test_transitions_of_a_failed_policy_are_not_learned_from(pga_me, turn):
  policy = nn.Dense(2)
  env = types.SimpleNamespace(observation_size=3, action_size=2, state_descriptor_length=1)
  config = pga_me.PGAMEConfig(
    env_batch_size=4,
    num_critic_training_steps=2,
    num_pg_training_steps=2,
    replay_buffer_size=64,
    critic_hidden_layer_size=(4,),
    batch_size=8,
  )
  emitter = pga_me.PGAMEEmitter(config, policy_network=policy, env=env, variation_fn=isoline)

  def played(count, failed=()):
    keys = iter(jax.random.split(jax.random.key(count), 8))
    draw = lambda *shape: jax.random.normal(next(keys), (count, 5, *shape))  # noqa: E731
    zeros = jnp.zeros((count, 5))
    transitions = QDTransition(
      obs=draw(3), next_obs=draw(3), rewards=draw(), dones=zeros, truncations=zeros, actions=draw(2),
      state_desc=draw(1), next_state_desc=draw(1),
    )  # fmt: skip
    return {"transitions": jax.tree.map(lambda leaf: leaf.at[jnp.asarray(failed, int)].set(jnp.nan), transitions)}

  genotypes = jax.vmap(policy.init, in_axes=(0, None))(jax.random.split(jax.random.key(0), 4), jnp.zeros(3))
  loop = CycleQD(None, PerArchiveEmitter(emitter))
  rng = np.random.default_rng(0)
  first = rng.random((4, K), np.float32)
  repertoire, state, _ = loop.init_ask_tell(genotypes, first, GRID, jax.random.key(1), extra_scores=played(4))
  for number in range(2 + turn):
    children, info = loop.ask(repertoire, state, jax.random.key(number))
    scores = rng.random((4, K), np.float32)
    scores[2] = np.nan
    repertoire, state, _ = loop.tell(children, scores, repertoire, state, played(4, [2]), info)
  assert not any(np.isnan(leaf).any() for leaf in floats(state.states) if leaf.ndim < 2 or leaf.shape[-2] != 64)
  children, _ = loop.ask(repertoire, state, jax.random.key(9))
  assert all(np.isfinite(leaf).all() for leaf in floats(children))


SEARCHES = {
  "CMA-ES": lambda: cma_es(jnp.zeros(D), batch_size=6, step_size=0.3),
  "NSGA-II": lambda: nsga2(D, batch_size=6, num_tasks=K, population_size=6, low=-1.0, high=1.0),
  "random": lambda: random_search(D, batch_size=6, low=-1.0, high=1.0),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_batch_that_failed_whole_changes_nothing(name, failure):
  search = SEARCHES[name]()
  candidates = search.ask(search.state, jax.random.key(0))
  state = search.tell(search.state, candidates, jnp.asarray(scores_of(candidates)))
  after = search.tell(state, search.ask(state, jax.random.key(1)), jnp.full((6, K), FAILURES[failure]))
  jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("failure", FAILURES)
def test_cma_es_learns_what_it_would_of_the_worst(failure):
  search = SEARCHES["CMA-ES"]()
  candidates = search.ask(search.state, jax.random.key(0))
  worst, failed = (scores_of(candidates) for _ in range(2))
  worst[2], failed[2, 1] = 0.0, FAILURES[failure]
  jax.tree.map(
    np.testing.assert_array_equal,
    search.tell(search.state, candidates, jnp.asarray(failed)),
    search.tell(search.state, candidates, jnp.asarray(worst)),
  )
