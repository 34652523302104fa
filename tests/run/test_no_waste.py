"""No waste in the loop, whatever a genotype is: nothing compiled anew, no transfer, no copy of the archives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_cases import tiny_settings

from cqd_jax.archive import Grid
from cqd_jax.low_rank import partition_shared
from cqd_jax.models import DecoderConfig, bucket_prompts, decode_population, init_params
from cqd_jax.run.loop import make_emitter
from cqd_jax.run.space import MergeSpace, make_space
from cqd_jax.search import CycleQD

CONFIG = DecoderConfig(23, 16, 24, 2, 2, 2, 8)
KINDS = {
  "dense": {},
  "core, paper's mutation": {"genotype": "core", "rank": 2, "mutation": "svd"},
  "core, base shared": {"genotype": "core", "rank": 2, "share_base": True},
  "coefficients": {"genotype": "coefficients", "rank": 2, "coefficient_starts": ()},
}


def make_experts():
  models = [init_params(jax.random.key(seed), CONFIG) for seed in range(4)]
  experts = jax.tree.map(lambda base, *tuned: jnp.stack(tuned) - base[None], *models)
  return models[0], experts


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", KINDS)
def test_no_waste(tmp_path, caplog, kind):
  settings = dataclasses.replace(tiny_settings(tmp_path).evolution, **KINDS[kind])
  space = make_space(settings, MergeSpace(*make_experts()))
  cycleqd = CycleQD(None, make_emitter(settings, space))
  scores = np.random.default_rng(0).uniform(size=(8, 3, 3)).astype(np.float32)
  grid = Grid.from_experts(scores[0], shape=4)
  repertoire, state, _ = cycleqd.init_ask_tell(space.initial, scores[0], grid, jax.random.key(1), capacity=40)
  pool = max(jax.tree.leaves(repertoire.genotypes), key=lambda leaf: leaf.size)
  shape, pointer = pool.shape, pool.unsafe_buffer_pointer()
  ask, tell = jax.jit(cycleqd.ask), jax.jit(cycleqd.tell, donate_argnames=("repertoire", "emitter_state"))
  buckets = jax.device_put(bucket_prompts([[3, 4], [5, 6, 7]], num_buckets=1))
  keys = list(jax.random.split(jax.random.key(2), 8))
  for iteration, (key, each) in enumerate(zip(keys, map(jax.device_put, scores), strict=True)):
    with jax.log_compiles(iteration > 0), jax.transfer_guard("disallow" if iteration else "allow"):
      children, info = ask(repertoire, state, key)
      models = space.models(children)
      with jax.transfer_guard("allow"):  # the settings of decoding are a few numbers
        tokens, _ = decode_population(models, CONFIG, buckets, max_new_tokens=3, end_ids=(0,))
      repertoire, state, _ = tell(children, each, repertoire, state, None, info)
    assert tokens.shape == (3, 2, 3)
  assert "Compiling" not in caplog.text
  assert "Finished" not in caplog.text
  pool = max(jax.tree.leaves(repertoire.genotypes), key=lambda leaf: leaf.size)
  assert pool.shape == shape
  assert pool.unsafe_buffer_pointer() == pointer
  memory = tell.lower(children, each, repertoire, state, None, info).compile().memory_analysis()
  held = sum(leaf.nbytes for leaf in jax.tree.leaves((repertoire.genotypes, state)))
  assert memory.alias_size_in_bytes >= held  # all of it is written in place
  assert memory.temp_size_in_bytes < held / 20 + 20_000
  own, shared = partition_shared(models)
  assert (not jax.tree.leaves(shared)) == (kind != "core, base shared")
  assert {leaf.shape[0] for leaf in jax.tree.leaves(own)} == {3}
