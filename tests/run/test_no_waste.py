"""No waste in the loop, whatever a genotype is: nothing compiled again, no transfer, no copy of the archives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.config.plugs import Plug, resolve
from cqd_jax.genotypes.space import dense_space
from cqd_jax.low_rank import partition_shared
from cqd_jax.models import DecoderConfig, bucket_prompts, decode_population, init_params
from cqd_jax.search.algorithm import SearchContext
from cqd_jax.tasks import Scored

CONFIG = DecoderConfig(23, 16, 24, 2, 2, 2, 8)
KINDS = {
  "dense": Plug("cycleqd"),
  "core, paper's mutation": Plug(
    "cycleqd", {"genotype": {"use": "core", "rank": 2}, "mutation": {"use": "svd", "max_scale": 2.0}}
  ),
  "core, base shared": Plug("cycleqd", {"genotype": {"use": "core", "rank": 2, "share_base": True}}),
  "coefficients": Plug("cycleqd", {"genotype": {"use": "coefficients", "rank": 2}}),
  "CMA-ES": Plug("cma_es", {"batch_size": 4}),
  "NSGA-II": Plug("nsga2", {"batch_size": 3}),
}


def make_root():
  """Drawn by NumPy: for JAX a generator would be compiled a shape, and here with all optimizations."""
  source = np.random.default_rng(0)
  base = jax.eval_shape(functools.partial(init_params, config=CONFIG), jax.random.key(0))

  def draw(*lead):
    return jax.tree.map(lambda leaf: jnp.asarray(source.normal(size=(*lead, *leaf.shape)).astype(np.float32)), base)

  return dense_space(draw(), draw(3))


LONG = tuple(kind for kind in KINDS if kind != "dense")


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.soak] * (kind in LONG)) for kind in KINDS])
def test_no_waste(caplog, kind):
  plug = KINDS[kind] if kind in ("CMA-ES", "NSGA-II") else KINDS[kind].with_settings(batch_size=3)
  context = SearchContext(make_root(), lambda rank, make: make(), ("a", "b", "c"), 40)
  algorithm = resolve("methods", plug, "method")(context)
  space, size = algorithm.space, algorithm.batch_size
  values = np.random.default_rng(0).uniform(size=(8, size, 3, 5)).astype(np.float32)
  initial = Scored(values[0, :3]).with_scores()
  state = algorithm.init(jax.random.key(1), space.initial, initial)
  ask = jax.jit(algorithm.ask)
  tell = jax.jit(
    lambda state, genotypes, values, info: algorithm.tell(state, genotypes, Scored(values).with_scores(), info),
    donate_argnums=0,
  )
  buckets = jax.device_put(bucket_prompts([[3, 4], [5, 6, 7]], num_buckets=1))
  keys = list(jax.random.split(jax.random.key(2), 8))
  for iteration, (key, each) in enumerate(zip(keys, map(jax.device_put, values), strict=True)):
    with jax.log_compiles(iteration > 0), jax.transfer_guard("disallow" if iteration else "allow"):
      children, info = ask(state, key)
      models = space.materialize(space.as_scored(children))
      with jax.transfer_guard("allow"):  # the settings of decoding are a few numbers
        tokens, _ = decode_population(models, CONFIG, buckets, max_new_tokens=3, end_ids=(0,))
      state, _ = tell(state, children, each, info)
    if not iteration:  # what was made outside of a program may lie where none can write in place
      shape, pointer = pool_of(state)
    assert tokens.shape == (size, 2, 3)
  assert "Compiling" not in caplog.text
  assert "Finished" not in caplog.text
  assert pool_of(state) == (shape, pointer)
  memory = tell.lower(state, children, each, info).compile().memory_analysis()
  if hasattr(state, "repertoire"):
    kept = (state.repertoire.genotypes, state.emitter_state)
  else:
    kept = (state.candidates, state.values, state.scores)
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
  assert memory.alias_size_in_bytes >= held  # all of it is written in place
  assert memory.temp_size_in_bytes < held / 20 + 20_000
  own, shared = partition_shared(models)
  assert (not jax.tree.leaves(shared)) == (kind != "core, base shared")
  assert {leaf.shape[0] for leaf in jax.tree.leaves(own)} == {size}


def pool_of(state):
  """Shape and place of the largest array that individuals are kept in."""
  kept = state.repertoire.genotypes if hasattr(state, "repertoire") else state.candidates
  pool = max(jax.tree.leaves(kept), key=lambda leaf: leaf.size)
  return pool.shape, pool.unsafe_buffer_pointer()
