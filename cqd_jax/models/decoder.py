"""The decoder: one function from token ids to logits, for every model that `DecoderConfig` can describe.

Params are nested dicts; the layers' leaves are stacked on a leading axis L and run by `jax.lax.scan`:

```
embed/embedding [V, d]
layers/attention_norm/scale [L, d]
layers/attention/{query,key,value,output}/kernel [L, in, out]   (and bias [L, out])
layers/attention/{query_norm,key_norm}/scale [L, head_dim]      (qk_norm)
layers/mlp_norm/scale [L, d]
layers/mlp/{gate,up,down}/kernel [L, in, out]                  (and bias [L, out])
final_norm/scale [d]
head/kernel [d, V]                                              (unless the embedding is tied)
```

Or `layers` is a list of L such trees without the leading axis, as `unstack_layers` makes it.

A kernel, or the embedding, may be a `cqd_jax.low_rank.LowRankUpdate`.

Activations have the dtype of the params. Norms, rotations, attention weights and logits are computed in float32.
"""

import math
import operator
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cqd_jax.low_rank import LowRankUpdate, matmul, take_rows
from cqd_jax.models.config import DecoderConfig, RopeScaling
from cqd_jax.types import Params, PRNGKey

Tokens: TypeAlias = Int[Array | np.ndarray, "B T"]
"""An integer for each token of each row."""


def init_params(key: PRNGKey, config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
  """Random weights: normal of variance 1/in for kernels, .02^2 for the embedding; norms 1, biases 0.

  The kernels that write to the residual stream are divided by sqrt(2 L) besides, so that its variance does not grow
  with depth (Radford et al. 2019).

  Args:
    key: typed PRNG key; consumed.
    config: the decoder.
    dtype: of every leaf.

  Returns:
    Params as the module's docstring lays them out.
  """
  keys = iter(jax.random.split(key, 9))
  depth, width = config.num_layers, config.hidden_size
  queries, keys_values = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

  def kernel(*shape: int, scale: float = 1.0) -> jax.Array:
    weights = jax.random.normal(next(keys), shape) * (scale / math.sqrt(shape[-2]))
    return weights.astype(dtype)

  def dense(size_in: int, size_out: int, *, bias: bool = False, scale: float = 1.0) -> Params:
    layer = {"kernel": kernel(depth, size_in, size_out, scale=scale)}
    return layer | ({"bias": jnp.zeros((depth, size_out), dtype)} if bias else {})

  def norm(*shape: int) -> Params:
    return {"scale": jnp.ones(shape, dtype)}

  into_residual = 1 / math.sqrt(2 * depth)
  attention = {
    "query": dense(width, queries, bias=config.qkv_bias),
    "key": dense(width, keys_values, bias=config.qkv_bias),
    "value": dense(width, keys_values, bias=config.qkv_bias),
    "output": dense(queries, width, bias=config.output_bias, scale=into_residual),
  }
  if config.qk_norm:
    attention |= {"query_norm": norm(depth, config.head_dim), "key_norm": norm(depth, config.head_dim)}
  mlp = {
    "gate": dense(width, config.intermediate_size, bias=config.mlp_bias),
    "up": dense(width, config.intermediate_size, bias=config.mlp_bias),
    "down": dense(config.intermediate_size, width, bias=config.mlp_bias, scale=into_residual),
  }
  embedding = (0.02 * jax.random.normal(next(keys), (config.vocab_size, width))).astype(dtype)
  params = {
    "embed": {"embedding": embedding},
    "layers": {
      "attention_norm": norm(depth, width),
      "attention": attention,
      "mlp_norm": norm(depth, width),
      "mlp": mlp,
    },
    "final_norm": norm(width),
  }
  return params if config.tie_embeddings else params | {"head": {"kernel": kernel(width, config.vocab_size)}}


def forward(
  params: Params,
  config: DecoderConfig,
  token_ids: Tokens,
  *,
  attention_mask: Bool[Array | np.ndarray, "B T"] | Tokens | None = None,
  segment_ids: Tokens | None = None,
  positions: Tokens | None = None,
) -> Float[Array, "B T V"]:
  """Logits of the token that follows each position.

  A position sees itself and what lies before it in its own segment. Differentiable in `params`.

  Args:
    params: weights, as the module's docstring lays them out.
    config: the decoder; static under jit.
    token_ids: `[B, T]` in [0, V); an id outside is clamped, as in any gather of JAX.
    attention_mask: `[B, T]`, true (1) at tokens, false (0) at padding, on either side. None: no padding.
    segment_ids: `[B, T]`, for rows in which several sequences are packed: equal where tokens belong to one sequence,
      whose tokens must be adjacent. Give this or `attention_mask`.
    positions: `[B, T]` for the rotation. None: counted from 0 in each segment, padding left out.

  Returns:
    `[B, T, V]` float32. At padding: finite, without meaning.

  Raises:
    ValueError: if both `attention_mask` and `segment_ids` are given.
  """
  if attention_mask is not None and segment_ids is not None:
    raise ValueError("segment_ids: expected None beside an attention_mask (give padding a segment of its own)")
  ids = jnp.asarray(token_ids)
  mask, segments, places = (
    None if given is None else jnp.asarray(given) for given in (attention_mask, segment_ids, positions)
  )
  if places is None:
    places = default_positions(ids, mask, segments)
  if mask is not None:
    segments = mask.astype(jnp.int32)
  visible = visibility(config, places, segments)
  hidden, _ = run_layers(params, config, embed(params, ids), places, visible)
  return unembed(params, config, hidden)


def linear(params: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
  """`x @ kernel + bias`: where a kernel, an array or a `LowRankUpdate`, meets an activation; `bias` may be absent."""
  y = matmul(x, params["kernel"])
  if "bias" not in params:
    return y
  return y + params["bias"].reshape((1,) * (y.ndim - 1) + (-1,))


def embed(params: Params, token_ids: Int[Array, "B T"]) -> Float[Array, "B T d"]:
  """The rows of the embedding."""
  return take_rows(params["embed"]["embedding"], token_ids)


def unembed(params: Params, config: DecoderConfig, hidden: Float[Array, "*B d"]) -> Float[Array, "*B V"]:
  """Float32 logits of hidden states: final norm, then the head or the transposed embedding."""
  hidden = rms_norm(params["final_norm"], config, hidden)
  kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
  # Not rounded to bfloat16: neighboring logits would tie, and argmax would decide by index.
  return matmul(hidden, kernel, preferred_element_type=jnp.float32)


def rms_norm(params: Params, config: DecoderConfig, x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
  """`x / sqrt(mean(x^2) + eps) * scale` over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467)."""
  wide = x.astype(jnp.float32)
  wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.rms_norm_eps)
  scale = params["scale"].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (wide * scale).astype(x.dtype)


def rope_frequencies(config: DecoderConfig) -> Float[Array, " F"]:
  """Radians a position, `[head_dim / 2]` float32 (Su et al. 2021, arXiv:2104.09864), stretched by `rope_scaling`.

  Computed on the host, rounded to float32 after each step: that is how published models were trained, and at position
  100,000 the last bit of a frequency turns a head by a hundredth of a radian.
  """
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  powers = (np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
  frequencies = np.float32(1) / powers
  return jnp.asarray(frequencies if config.rope_scaling is None else _stretch(frequencies, config.rope_scaling))


def _stretch(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Llama 3.1's rule: 1 / factor of long waves, short waves as they are, a linear blend in between."""
  wavelengths = np.float32(2 * math.pi) * (np.float32(1) / frequencies)
  turns = np.float32(scaling.original_max_positions) * (np.float32(1) / wavelengths)
  low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
  kept = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
  stretched = frequencies / np.float32(scaling.factor)
  return np.where(kept == 1, frequencies, (1 - kept) * stretched + kept * frequencies)


def rope_angles(config: DecoderConfig, positions: Int[Array, "B T"]) -> Float[Array, "2 B T F"]:
  """Cosines and sines of the rotations at `positions`, float32."""
  # Not a matrix product, which accelerators round to bfloat16.
  angles = positions.astype(jnp.float32)[:, :, None] * rope_frequencies(config)[None, None]
  return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "B T N D"], angles: Float[Array, "2 B T F"]) -> Float[Array, "B T N D"]:
  """Rotates each head; dimension i is paired with i + D/2, the order of the published checkpoints."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cosine, sine = angles[:, :, :, None]
  turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
  return turned.astype(x.dtype)


def default_positions(
  token_ids: Int[Array, "B T"],
  attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None,
  segment_ids: Int[Array, "B T"] | None,
) -> Int[Array, "B T"]:
  """Positions counted from 0 in each segment; in a padded row padding is not counted."""
  if attention_mask is not None:
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)
  index = jax.lax.broadcasted_iota(jnp.int32, token_ids.shape, 1)
  if segment_ids is None:
    return index
  begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
  return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def visibility(
  config: DecoderConfig, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Bool[Array, "B T T"]:
  """Which key (last axis) each query sees. A padding query sees padding, so that no softmax is empty."""
  length = positions.shape[1]
  index = jnp.arange(length)
  visible = (index[:, None] >= index[None, :])[None]
  if segment_ids is not None:
    visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
  if config.sliding_window is not None:
    visible &= positions[:, :, None] - positions[:, None, :] < config.sliding_window
  return jnp.broadcast_to(visible, (positions.shape[0], length, length))


def run_layers(
  params: Params,
  config: DecoderConfig,
  hidden: Float[Array, "B T d"],
  positions: Int[Array, "B T"],
  visible: Bool[Array, "B T T"],
) -> tuple[Float[Array, "B T d"], tuple[Float[Array, "L B T G D"], Float[Array, "L B T G D"]]]:
  """All layers over whole sequences.

  Returns:
    The hidden states before the final norm, and every layer's rotated keys and its values (dead code where unused).
  """
  angles = rope_angles(config, positions)

  def block(hidden: jax.Array, layer: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    query, key, value = project(layer, config, hidden, angles)
    hidden += linear(layer["attention"]["output"], attend(query, key, value, visible))
    return hidden + feed_forward(layer, config, hidden), (key, value)

  layers = params["layers"]
  if not is_unstacked(layers):
    return jax.lax.scan(block, hidden, layers)
  caches = []
  for layer in layers:
    hidden, cache = block(hidden, layer)
    caches.append(cache)
  keys, values = zip(*caches, strict=True)
  return hidden, (jnp.stack(keys), jnp.stack(values))


def unstack_layers(params: Params) -> Params:
  """Params whose `layers` is a list of L trees, each layer's weights arrays of their own.

  Decoding takes the stacked layers apart at every call, at the price of a copy of them; these it takes as they are. The
  programs are larger, and take longer to compile.

  Raises:
    ValueError: for a population of a shared base, whose cores do not begin with the layers: unstack the base before
      `CoreBasis.from_experts` instead.
  """
  layers = params["layers"]
  if is_unstacked(layers):
    return params
  for node in jax.tree.leaves(layers, is_leaf=lambda node: isinstance(node, LowRankUpdate)):
    if isinstance(node, LowRankUpdate) and node.core.ndim != node.kernel.ndim:
      raise ValueError(
        "params: expected one individual, got a population that shares a base; unstack the base before its experts "
        "are put into core space"
      )
  depth = jax.tree.leaves(layers)[0].shape[0]
  return {**params, "layers": [jax.tree.map(operator.itemgetter(layer), layers) for layer in range(depth)]}


def is_unstacked(layers: Params) -> bool:
  """Whether layers are a list of trees, and not one tree of stacked leaves."""
  return isinstance(layers, list | tuple)


def project(
  layer: Params, config: DecoderConfig, hidden: Float[Array, "B T d"], angles: Float[Array, "2 B T F"]
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T G D"], Float[Array, "B T G D"]]:
  """Rotated queries, rotated keys, and values of one layer."""
  attention = layer["attention"]
  normed = rms_norm(layer["attention_norm"], config, hidden)
  heads = (*hidden.shape[:2], -1, config.head_dim)
  query = linear(attention["query"], normed).reshape(heads)
  key = linear(attention["key"], normed).reshape(heads)
  value = linear(attention["value"], normed).reshape(heads)
  if config.qk_norm:
    query = rms_norm(attention["query_norm"], config, query)
    key = rms_norm(attention["key_norm"], config, key)
  return rotate(query, angles), rotate(key, angles), value


def attend(
  query: Float[Array, "B T H D"],
  key: Float[Array, "B S G D"],
  value: Float[Array, "B S G D"],
  visible: Bool[Array, "B T S"],
) -> Float[Array, "B T O"]:
  """Attention with H/G query heads a key head; heads joined on the last axis of the result."""
  grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
  scores = jnp.einsum("btgrd,bsgd->bgrts", grouped, key, preferred_element_type=jnp.float32)
  weights = attention_weights(scores / math.sqrt(query.shape[-1]), visible[:, None, None])
  mixed = jnp.einsum("bgrts,bsgd->btgrd", weights.astype(value.dtype), value)
  return mixed.reshape(*query.shape[:2], -1)


def attention_weights(scores: Float[Array, "*B S"], visible: Bool[Array, "*C S"]) -> Float[Array, "*B S"]:
  """Softmax over the visible keys; `visible` broadcasts against `scores`, rank by rank."""
  # finite, so that a query that sees nothing gives no NaN, in its gradient neither
  return jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min), axis=-1)


def feed_forward(layer: Params, config: DecoderConfig, hidden: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
  """The gated feed-forward part of one layer, its norm included (Shazeer 2020, arXiv:2002.05202)."""
  mlp, normed = layer["mlp"], rms_norm(layer["mlp_norm"], config, hidden)
  return linear(mlp["down"], jax.nn.silu(linear(mlp["gate"], normed)) * linear(mlp["up"], normed))
