"""Small decoders, one a feature, and random weights for them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.models import DecoderConfig, RopeScaling, init_params

PLAIN = DecoderConfig(
  vocab_size=23,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=4,
  head_dim=4,
  rope_theta=100.0,
)

STRETCHED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16)

CONFIGS = {
  "plain": PLAIN,
  "grouped": dataclasses.replace(PLAIN, num_kv_heads=2),
  "multi_query_wide_heads": dataclasses.replace(PLAIN, num_kv_heads=1, head_dim=10),
  "qkv_bias": dataclasses.replace(PLAIN, qkv_bias=True),
  "output_bias": dataclasses.replace(PLAIN, output_bias=True),
  "qk_norm": dataclasses.replace(PLAIN, qk_norm=True),
  "tied": dataclasses.replace(PLAIN, tie_embeddings=True),
  "rope_scaling": dataclasses.replace(PLAIN, rope_scaling=STRETCHED),
  "large_eps": dataclasses.replace(PLAIN, rms_norm_eps=0.3),
  "window": dataclasses.replace(PLAIN, sliding_window=3),
  "one_layer": dataclasses.replace(PLAIN, num_layers=1),
  "everything": dataclasses.replace(
    PLAIN,
    num_kv_heads=2,
    head_dim=6,
    rope_scaling=STRETCHED,
    qkv_bias=True,
    output_bias=True,
    qk_norm=True,
    tie_embeddings=True,
    sliding_window=5,
  ),
}


@functools.cache
def shapes_of(config):
  return jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))


def make_model(config, seed=0, dtype="float32"):
  """Params in which nothing is at its initial constant: norms are not 1, biases not 0, logits far from equal.

  Those of `init_params` with noise of .3, in distribution; drawn by NumPy, since JAX compiles a generator a shape.
  """
  source = np.random.default_rng(seed)

  def draw(path, leaf):
    layer, name = (entry.key for entry in path[-2:])
    center, std = (1.0, 0.3) if name == "scale" else (0.0, 0.3)
    if name == "kernel":
      depth = 2 * config.num_layers if layer in ("output", "down") else 1
      std = math.hypot(1 / math.sqrt(leaf.shape[-2] * depth), 0.3)
    values = center + std * source.standard_normal(leaf.shape)
    return jnp.asarray(values.astype(np.float32).astype(jnp.dtype(dtype)))

  return jax.tree.map_with_path(draw, shapes_of(config))


def to_float64(params):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def random_tokens(config, *shape, seed=1):
  return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)
