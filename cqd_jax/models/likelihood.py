"""How likely models find given continuations: what a question with choices is scored by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cqd_jax.low_rank import combine_shared, partition_shared
from cqd_jax.models import decoder
from cqd_jax.models.config import DecoderConfig
from cqd_jax.types import Params


def continuation_likelihoods(
  params: Params,
  config: DecoderConfig,
  token_ids: Int[Array | np.ndarray, "N T"],
  starts: Int[Array | np.ndarray, " N"],
  ends: Int[Array | np.ndarray, " N"],
  *,
  longest: int,
) -> Float[Array, "P N"]:
  """Log-likelihoods of the ends of rows, given their beginnings, for each of P candidates.

  Only the states that predict the ends are turned into logits: a vocabulary is large.

  Args:
    params: leaves `[P, ...]`, as of `decode_population`.
    config: the decoder, the same for all.
    token_ids: `[N, T]` rows, then padding of any value.
    starts: `[N]` where the continuation begins, at least 1.
    ends: `[N]` where it ends, at most `start + longest` and T.
    longest: static; tokens of the longest continuation.

  Returns:
    Sums over the tokens of each continuation, `[P, N]` float32, natural logarithms.
  """
  own, shared = partition_shared(params)
  return _likelihoods(own, shared, config, token_ids, starts, ends, longest)


@functools.partial(jax.jit, static_argnums=(2, 6))
def _likelihoods(
  own: Params,
  shared: Params,
  config: DecoderConfig,
  token_ids: jax.Array,
  starts: jax.Array,
  ends: jax.Array,
  longest: int,
) -> jax.Array:
  places = jnp.arange(token_ids.shape[1])[None, :]
  positions = jnp.broadcast_to(places, token_ids.shape)
  visible = decoder.visibility(config, positions, (places < ends[:, None]).astype(jnp.int32))
  steps = jnp.minimum(starts[:, None] + jnp.arange(longest)[None, :], token_ids.shape[1] - 1)
  targets = jnp.take_along_axis(token_ids, steps, axis=1)
  counted = starts[:, None] + jnp.arange(longest)[None, :] < ends[:, None]

  def one(own: Params) -> jax.Array:
    params = combine_shared(own, shared)
    hidden, _ = decoder.run_layers(params, config, decoder.embed(params, token_ids), positions, visible)
    before = jnp.take_along_axis(hidden, steps[:, :, None] - 1, axis=1)
    logs = jax.nn.log_softmax(decoder.unembed(params, config, before), axis=-1)
    of_targets = jnp.take_along_axis(logs, targets[:, :, None], axis=2)[:, :, 0]
    return jnp.where(counted, of_targets, 0).sum(axis=1)

  result: jax.Array = jax.lax.map(one, own)
  return result
