import dataclasses
import math

import decoder_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import CONFIGS, PLAIN, make_model, random_tokens, to_float64

from cqd_jax.models import RopeScaling, forward, init_params, linear
from cqd_jax.models.decoder import rope_frequencies

run = jax.jit(forward, static_argnums=1)


def expected_logits(params, config, token_ids):
  return np.stack([decoder_reference.logits(to_float64(params), config, row) for row in token_ids])


def test_logits_are_those_of_the_definition(config):
  params, token_ids = make_model(config), random_tokens(config, 2, 7)
  logits = run(params, config, token_ids)
  assert logits.shape == (2, 7, config.vocab_size)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected_logits(params, config, token_ids), rtol=2e-5, atol=2e-5)


def test_every_feature_changes_the_logits():
  # else the comparison above could pass with a feature that neither side has
  token_ids = random_tokens(PLAIN, 2, 7)
  plain = run(make_model(PLAIN), PLAIN, token_ids)
  for name in ("rope_scaling", "large_eps", "window"):
    assert np.abs(run(make_model(PLAIN), CONFIGS[name], token_ids) - plain).max() > 0.01, name


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_bfloat16_gives_float32_logits_of_its_own_accuracy(name):
  config = CONFIGS[name]
  params, token_ids = make_model(config, dtype="bfloat16"), random_tokens(config, 2, 7)
  logits = run(params, config, token_ids)
  expected = expected_logits(params, config, token_ids)
  assert logits.dtype == jnp.float32
  # a few dozen roundings to 8 bits of mantissa, of .2% each: a few percent of the logits' own spread
  assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.08 * expected.std()
  assert np.any(np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16), np.float32))


@pytest.mark.parametrize("name", ["plain", "window", "everything"])
def test_padding_on_either_side_does_not_touch_the_tokens(name):
  config = CONFIGS[name]
  params = make_model(config)
  sequences = [random_tokens(config, length, seed=length) for length in (1, 4, 7, 1, 4, 7)]
  token_ids, mask = np.full((6, 7), 5, np.int32), np.zeros((6, 7), bool)
  for row, sequence in enumerate(sequences):
    columns = slice(7 - len(sequence), 7) if row < 3 else slice(0, len(sequence))
    token_ids[row, columns], mask[row, columns] = sequence, True
  logits = run(params, config, token_ids, attention_mask=mask)
  assert np.isfinite(logits).all()
  for row, sequence in enumerate(sequences):
    alone = decoder_reference.logits(to_float64(params), config, sequence)
    np.testing.assert_allclose(logits[row][mask[row]], alone, rtol=2e-5, atol=2e-5)
  np.testing.assert_array_equal(logits, run(params, config, token_ids, attention_mask=mask.astype(np.int32)))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_packed_segments_do_not_see_one_another(name):
  config = CONFIGS[name]
  params = make_model(config)
  first, second = random_tokens(config, 3, seed=3), random_tokens(config, 5, seed=4)
  token_ids = np.concatenate([first, second, [0, 0]])[None].astype(np.int32)
  logits = run(params, config, token_ids, segment_ids=np.array([[1, 1, 1, 2, 2, 2, 2, 2, 0, 0]], np.int32))
  for part, sequence in ((logits[0, :3], first), (logits[0, 3:8], second)):
    alone = decoder_reference.logits(to_float64(params), config, sequence)
    np.testing.assert_allclose(part, alone, rtol=2e-5, atol=2e-5)


def test_given_positions_replace_the_counted_ones():
  params, token_ids = make_model(PLAIN), random_tokens(PLAIN, 1, 6)
  counted = run(params, PLAIN, token_ids)
  shifted = run(params, PLAIN, token_ids, positions=np.arange(11, 17, dtype=np.int32)[None])
  stretched = run(params, PLAIN, token_ids, positions=2 * np.arange(6, dtype=np.int32)[None])
  np.testing.assert_allclose(shifted, counted, rtol=1e-4, atol=1e-4)  # rotations are relative
  assert np.abs(stretched - counted).max() > 0.01


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_logits_do_not_depend_on_later_tokens(name):
  config = CONFIGS[name]
  params, token_ids = make_model(config), random_tokens(config, 1, 6)
  changed = token_ids.copy()
  changed[0, 4:] = (changed[0, 4:] + 1) % config.vocab_size
  before, after = run(params, config, token_ids), run(params, config, changed)
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert np.abs(before[:, 4:] - after[:, 4:]).max() > 0.01


def test_gradient_is_that_of_the_definition():
  config = CONFIGS["everything"]
  params, token_ids = make_model(config), random_tokens(config, 1, 4)
  direction = make_model(config, seed=9)

  def total(params):
    return jnp.sum(jnp.tanh(forward(params, config, token_ids)))

  gradient = jax.jit(jax.grad(total))(params)
  slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))

  def moved(step):
    there = jax.tree.map(lambda p, d: p + step * d, to_float64(params), to_float64(direction))
    return np.tanh(decoder_reference.logits(there, config, token_ids[0])).sum()

  expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
  np.testing.assert_allclose(slope, expected, rtol=1e-3)


def test_gradient_is_finite_with_padding_and_in_bfloat16():
  config = CONFIGS["everything"]
  params, token_ids = make_model(config, dtype="bfloat16"), random_tokens(config, 2, 5)
  mask = np.array([[0, 0, 0, 0, 1], [1, 1, 0, 0, 0]], bool)

  def total(params):
    return jnp.sum(forward(params, config, token_ids, attention_mask=mask) * mask[:, :, None])

  for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(params)):
    assert leaf.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_attention_mask_and_segments_together_are_refused():
  token_ids = random_tokens(PLAIN, 1, 3)
  with pytest.raises(ValueError, match="segment_ids"):
    forward(make_model(PLAIN), PLAIN, token_ids, attention_mask=token_ids > 0, segment_ids=token_ids)


def test_linear_adds_the_bias_where_there_is_one():
  kernel, bias, x = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([10.0, 20.0]), jnp.array([[[1.0, -1.0]]])
  np.testing.assert_array_equal(linear({"kernel": kernel}, x), [[[-2.0, -2.0]]])
  np.testing.assert_array_equal(linear({"kernel": kernel, "bias": bias}, x), [[[8.0, 18.0]]])


def test_llama3_frequencies_are_those_worked_out_by_hand():
  # theta 10,000 and head_dim 8: 1, .1, .01, .001 radians a position, wavelengths 6.28, 62.8, 628, 6283.
  # Of 1024 original positions, above 1024 / 1 all is stretched, below 1024 / 4 nothing.
  scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=1024)
  config = dataclasses.replace(PLAIN, head_dim=8, rope_theta=10_000.0, rope_scaling=scaling)
  smooth = (1024 / (200 * math.pi) - 1) / 3
  blended = 0.01 * smooth + 0.01 / 8 * (1 - smooth)
  np.testing.assert_allclose(rope_frequencies(config), [1.0, 0.1, blended, 0.001 / 8], rtol=1e-6)
  plain = dataclasses.replace(config, rope_scaling=None)
  np.testing.assert_allclose(rope_frequencies(plain), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_params_have_the_stated_layout(dtype):
  everything = CONFIGS["everything"]
  params = init_params(jax.random.key(0), dataclasses.replace(everything, tie_embeddings=False), dtype)
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in jax.tree.leaves_with_path(params)
  }
  assert shapes == {
    "embed/embedding": (23, 16),
    "final_norm/scale": (16,),
    "head/kernel": (16, 23),
    "layers/attention/key/bias": (2, 12),
    "layers/attention/key/kernel": (2, 16, 12),
    "layers/attention/key_norm/scale": (2, 6),
    "layers/attention/output/bias": (2, 16),
    "layers/attention/output/kernel": (2, 24, 16),
    "layers/attention/query/bias": (2, 24),
    "layers/attention/query/kernel": (2, 16, 24),
    "layers/attention/query_norm/scale": (2, 6),
    "layers/attention/value/bias": (2, 12),
    "layers/attention/value/kernel": (2, 16, 12),
    "layers/attention_norm/scale": (2, 16),
    "layers/mlp/down/kernel": (2, 24, 16),
    "layers/mlp/gate/kernel": (2, 16, 24),
    "layers/mlp/up/kernel": (2, 16, 24),
    "layers/mlp_norm/scale": (2, 16),
  }
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
  assert "head" not in init_params(jax.random.key(0), everything)


def test_initial_kernels_differ_and_have_the_stated_variance():
  config = dataclasses.replace(PLAIN, hidden_size=64, intermediate_size=64, head_dim=16, num_layers=3)
  layers = init_params(jax.random.key(0), config)["layers"]
  kernels = {**layers["attention"], **layers["mlp"]}
  for name, kernel in kernels.items():
    scale = math.sqrt(1 / 64 / (6 if name in ("output", "down") else 1))
    # 12,288 normal samples: the standard deviation is known to .64%, so 5% is 8 standard errors
    np.testing.assert_allclose(np.std(kernel["kernel"]), scale, rtol=0.05)
  flat = [np.asarray(kernel["kernel"][layer]).ravel()[:4] for kernel in kernels.values() for layer in range(3)]
  assert len({tuple(part) for part in flat}) == len(flat)
