"""Models whose matrices are low-rank updates of one base: the same logits and tokens as those written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import CONFIGS, PLAIN, make_model, random_tokens

from cqd_jax.genotypes import CoreBasis
from cqd_jax.models import (
  bucket_population_prompts,
  bucket_prompts,
  decode_population,
  forward,
  greedy_decode,
  unstack_layers,
)

run = jax.jit(forward, static_argnums=1)
write_out = jax.jit(lambda basis, population: jax.vmap(basis.materialize)(population))


@functools.cache
def make_basis(config, dtype="float32", rank=2):
  base = make_model(config, dtype=dtype)
  experts = jax.tree.map(
    lambda *leaves: jnp.stack(leaves) * 0.3, *(make_model(config, seed, dtype) for seed in (1, 2, 3))
  )
  return CoreBasis.from_experts(base, experts, rank=rank)


@functools.partial(jax.jit, static_argnames="size")
def make_population(basis, size):
  weights = jax.random.dirichlet(jax.random.key(0), jnp.ones(basis.num_experts), (size,))
  return jax.tree.map(lambda leaf: jnp.einsum("pk,k...->p...", weights, leaf), basis.experts)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_with_the_materialized_model(name):
  config = CONFIGS[name]
  basis = make_basis(config)
  genotype = jax.tree.map(lambda leaf: leaf[0], make_population(basis, 1))
  ids = random_tokens(config, 2, 9)
  written = run(basis.materialize(genotype), config, ids)
  shared = run(basis.apply(genotype), config, ids)
  np.testing.assert_allclose(shared, written, rtol=1e-4, atol=1e-4)


def test_logits_agree_in_bfloat16():
  basis = make_basis(PLAIN, "bfloat16")
  genotype = jax.tree.map(lambda leaf: leaf[0], make_population(basis, 1))
  ids = random_tokens(PLAIN, 2, 9)
  written = np.asarray(run(basis.materialize(genotype), PLAIN, ids))
  shared = np.asarray(run(basis.apply(genotype), PLAIN, ids))
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), basis)
  exact = np.asarray(run(wide.materialize(genotype), PLAIN, ids))
  # Both round on the way; the shared one not much more than the one that is written out.
  assert np.linalg.norm(shared - exact) < 2 * np.linalg.norm(written - exact)


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("unstacked", [False, True], ids=["stacked", "unstacked"])
def test_decoding_agrees_with_the_materialized_models(name, group_size, unstacked):
  config = CONFIGS[name]
  basis = make_basis(config)
  population = make_population(basis, 4)
  prompts = [list(map(int, random_tokens(config, length, seed=length))) for length in (3, 7, 4)]
  buckets = bucket_prompts(prompts, num_buckets=2)
  options = {"max_new_tokens": 6, "end_ids": (0, 5)}
  written = write_out(basis, population)
  params = basis.apply(population)
  expected = decode_population(written, config, buckets, **options)
  if unstacked:
    alone = basis.apply(jax.tree.map(lambda leaf: leaf[0], population))
    tokens, lengths = greedy_decode(unstack_layers(alone), config, buckets[0].token_ids, buckets[0].lengths, **options)
    rows = buckets[0].rows
    np.testing.assert_array_equal(tokens, np.asarray(expected[0])[0, rows])
    np.testing.assert_array_equal(lengths, np.asarray(expected[1])[0, rows])
    return
  found = decode_population(params, config, buckets, group_size=group_size, **options)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_candidates_of_one_base_continue_their_own_prompts(group_size):
  config = CONFIGS["everything"]
  basis = make_basis(config)
  population = make_population(basis, 4)
  prompts = [[random_tokens(config, 1 + (3 * row + p) % 5, seed=10 * p + row) for row in range(3)] for p in range(4)]
  buckets = bucket_population_prompts(prompts, num_buckets=2)
  options = {"max_new_tokens": 6, "end_ids": (0, 5)}
  tokens, lengths = decode_population(basis.apply(population), config, buckets, group_size=group_size, **options)
  written = write_out(basis, population)
  for p, own in enumerate(prompts):
    member = jax.tree.map(lambda leaf, p=p: leaf[p : p + 1], written)
    expected = decode_population(member, config, bucket_prompts(own, num_buckets=1), **options)
    np.testing.assert_array_equal(tokens[p : p + 1], expected[0])
    np.testing.assert_array_equal(lengths[p : p + 1], expected[1])


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_base_that_is_unstacked_serves_a_population(group_size):
  base = unstack_layers(make_model(PLAIN))
  experts = [jax.tree.map(lambda leaf: leaf * 0.3, unstack_layers(make_model(PLAIN, seed))) for seed in (1, 2)]
  basis = CoreBasis.from_experts(base, experts, rank=2)
  population = basis.experts
  buckets = bucket_prompts([[3, 4, 5], [6, 7]], num_buckets=1)
  options = {"max_new_tokens": 5, "end_ids": (0,)}
  written = write_out(basis, population)
  expected = decode_population(written, PLAIN, buckets, **options)
  found = decode_population(basis.apply(population), PLAIN, buckets, group_size=group_size, **options)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  stacked = make_model(PLAIN)
  ids = random_tokens(PLAIN, 2, 5)
  np.testing.assert_allclose(run(base, PLAIN, ids), run(stacked, PLAIN, ids), atol=1e-5)
  assert unstack_layers(base) is base


def test_a_population_of_a_shared_base_cannot_be_unstacked():
  basis = make_basis(PLAIN)
  with pytest.raises(ValueError, match="params: expected one individual, got a population"):
    unstack_layers(basis.apply(make_population(basis, 2)))


def test_a_gradient_reaches_the_core():
  basis = make_basis(PLAIN)
  genotype = jax.tree.map(lambda leaf: leaf[0], basis.experts)
  ids = random_tokens(PLAIN, 1, 5)

  def loss(genotype, model):
    return jnp.square(forward(model(genotype), PLAIN, ids)).mean()

  ours, written = (
    jax.jit(jax.grad(functools.partial(loss, model=model)))(genotype) for model in (basis.apply, basis.materialize)
  )
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3), ours, written)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(ours))
