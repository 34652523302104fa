"""Greedy decoding with a KV cache: ragged prompts, one candidate or a population, all in one compiled call.

Inside, prompts are moved to the right end of their rows, so that every row writes its next key and value at the same
index: one contiguous update instead of a scatter. The prompts run once as whole sequences (prefill); then a
`jax.lax.while_loop` makes one token a row a step, until no row is left without an end token.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cqd_jax.checks import check_population
from cqd_jax.low_rank import combine_shared, partition_shared
from cqd_jax.models import decoder
from cqd_jax.models.config import DecoderConfig
from cqd_jax.models.prompts import PromptBucket, check_buckets
from cqd_jax.types import Params


class _Prefilled(NamedTuple):
  """What decoding starts from: a cache a layer with room for the answers, the first token, where each prompt begins."""

  cache: "_Cache"
  tokens: Int[Array, "*P B"]
  starts: Int[Array, "*P B"]


_Cache: TypeAlias = tuple[tuple[jax.Array, jax.Array], ...]
"""Of each layer: keys `[*P, B, G, D, S]` and values `[*P, B, G, S, D]`.

Both products of a step then run along the last axis of the cache, which is contiguous.
"""

_Lift: TypeAlias = Callable[..., Callable[..., Any]]
"""What makes a function of one candidate into one of a group: `jax.vmap`, or nothing."""


def greedy_decode(
  params: Params,
  config: DecoderConfig,
  prompt_tokens: Int[Array | np.ndarray, "B T"],
  prompt_lengths: Int[Array | np.ndarray, " B"],
  *,
  max_new_tokens: int,
  end_ids: Sequence[int],
  pad_id: int = 0,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
  """Continues each prompt with the likeliest token at every step, until an end token or `max_new_tokens`.

  Args:
    params: weights of one model, in the layout of `cqd_jax.models.decoder`.
    config: the decoder.
    prompt_tokens: `[B, T]` tokens, then padding of any value.
    prompt_lengths: `[B]` number of tokens of each prompt, from 1 to T. (Traced lengths are not checked; a row of
      length 0 gives tokens without meaning and leaves the other rows alone.)
    max_new_tokens: N, static, at least 1.
    end_ids: ids any of which ends an answer; may be empty.
    pad_id: what follows an end token in the result.

  Returns:
    Tokens `[B, N]` int32, the end token included, then `pad_id`; and the number of tokens before the end token `[B]`
    int32, which is N where none came. Of equally likely tokens the lowest id is taken.

  Raises:
    ValueError: if shapes do not agree, a length is outside [1, T], or a setting is outside its range.
  """
  bucket = PromptBucket(np.arange(len(prompt_lengths), dtype=np.int32), prompt_tokens, prompt_lengths)
  settings = _checked_settings(config, [bucket], None, max_new_tokens, end_ids, pad_id)
  return _greedy_decode(params, config, [bucket], *settings)


def decode_population(
  params: Params,
  config: DecoderConfig,
  buckets: Sequence[PromptBucket],
  *,
  max_new_tokens: int,
  end_ids: Sequence[int],
  pad_id: int = 0,
  group_size: int = 1,
) -> tuple[Int[Array, "P B N"], Int[Array, "P B"]]:
  """What `greedy_decode` gives, for P candidates on B prompts each, in one compiled call.

  Args:
    params: leaves `[P, ...]`: the candidates' weights. Where candidates share a base model (a matrix is a
      `cqd_jax.low_rank.LowRankUpdate`, as `CoreBasis.apply` gives it) only the core has the leading axis.
    config: the decoder, the same for all.
    buckets: the prompts, e.g. of `bucket_prompts`, which all candidates continue; or of `bucket_population_prompts`, of
      which candidate p continues the p-th. There may be some of both. Their `rows` are together 0 to B-1.
    max_new_tokens: N, static, at least 1.
    end_ids: ids any of which ends an answer.
    pad_id: what follows an end token in the result.
    group_size: how many candidates at most are decoded side by side: P candidates are as few groups of equal size as
      that allows, which run one after the other. Where P is no multiple of their size, the last one begins earlier, and
      what it finds again is dropped. 1 is best where one candidate's B rows fill the machine; more where steps wait for
      memory or launches, at `group_size` times the memory of the cache. Candidates of one base read it once a group and
      step.

  Returns:
    Tokens `[P, B, N]` int32 and lengths `[P, B]` int32 as of `greedy_decode`, prompts in their original order.

  Raises:
    ValueError: if shapes do not agree, the rows are no permutation, or a setting is outside its range.
  """
  own, shared = partition_shared(params)
  size = check_population(own, "params")
  if group_size < 1:
    raise ValueError(f"group_size: expected at least 1, got {group_size}")
  settings = _checked_settings(config, buckets, size, max_new_tokens, end_ids, pad_id)
  return _decode_population(own, shared, config, list(buckets), *settings, even_group_size(size, group_size))


def even_group_size(num_candidates: int, most: int) -> int:
  """The size of the groups in which `decode_population` takes P candidates, at most `most` side by side."""
  num_groups = max(-(-num_candidates // most), 1)
  return max(-(-num_candidates // num_groups), 1)


def _checked_settings(
  config: DecoderConfig,
  buckets: Sequence[PromptBucket],
  num_candidates: int | None,
  max_new_tokens: int,
  end_ids: Sequence[int],
  pad_id: int,
) -> tuple[int, np.ndarray, np.ndarray]:
  """The one static setting, and those that are arrays, lest they compile again; raises as the public functions say."""
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
  outside = [end_id for end_id in end_ids if not 0 <= end_id < config.vocab_size]
  if outside:
    raise ValueError(f"end_ids: expected ids in [0, {config.vocab_size}), got {outside}")
  check_buckets(buckets, num_candidates)
  return max_new_tokens, np.array(end_ids, np.int32), np.array(pad_id, np.int32)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _greedy_decode(
  params: Params,
  config: DecoderConfig,
  buckets: list[PromptBucket],
  max_new_tokens: int,
  end_ids: jax.Array,
  pad_id: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  return _decode_buckets(*partition_shared(params), config, buckets, max_new_tokens, end_ids, pad_id, _one)


@functools.partial(jax.jit, static_argnums=(2, 4, 7))
def _decode_population(
  own: Params,
  shared: Params,
  config: DecoderConfig,
  buckets: list[PromptBucket],
  max_new_tokens: int,
  end_ids: jax.Array,
  pad_id: jax.Array,
  group_size: int,
) -> tuple[jax.Array, jax.Array]:
  def decode(candidates: tuple[Params, list[Any]], lift: _Lift) -> tuple[jax.Array, jax.Array]:
    own, prompts = candidates
    theirs = [
      bucket if mine is None else PromptBucket(bucket.rows, *mine)
      for bucket, mine in zip(buckets, prompts, strict=True)
    ]
    return _decode_buckets(own, shared, config, theirs, max_new_tokens, end_ids, pad_id, lift)

  # None where all candidates have the same prompts, which then have no axis to be mapped over.
  prompts = [(bucket.token_ids, bucket.lengths) if bucket.token_ids.ndim == 3 else None for bucket in buckets]
  return _in_groups(decode, (own, prompts), group_size)


def _in_groups(
  decode: Callable[[Any, _Lift], tuple[jax.Array, jax.Array]], candidates: Any, group_size: int
) -> tuple[jax.Array, jax.Array]:
  """`decode(group, lift)` of one group of candidates after the other; leaves `[P, ...]` in and out."""
  if group_size == 1:
    return jax.lax.map(lambda candidate: decode(candidate, _one), candidates)
  size = jax.tree.leaves(candidates)[0].shape[0]
  if size % group_size == 0:
    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, group_size, *leaf.shape[1:]), candidates)
    tokens, lengths = jax.lax.map(lambda group: decode(group, jax.vmap), grouped)
    return tokens.reshape(-1, *tokens.shape[2:]), lengths.reshape(-1, *lengths.shape[2:])

  # Slices, which overlap: a population padded to whole groups would be a copy of all its weights.
  def decode_from(start: jax.Array) -> tuple[jax.Array, jax.Array]:
    group = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, group_size), candidates)
    return decode(group, jax.vmap)

  starts = np.minimum(np.arange(0, size, group_size, dtype=np.int32), size - group_size)
  tokens, lengths = jax.lax.map(decode_from, starts)
  again = -size % group_size  # how many of the last group have been decoded before

  def join(part: jax.Array) -> jax.Array:
    return jnp.concatenate([part[:-1].reshape(-1, *part.shape[2:]), part[-1, again:]])

  return join(tokens), join(lengths)


def _one(function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
  """The lift of a single candidate: `jax.vmap` without the axis."""
  del in_axes
  return function


def _decode_buckets(
  own: Params,
  shared: Params,
  config: DecoderConfig,
  buckets: list[PromptBucket],
  max_new_tokens: int,
  end_ids: jax.Array,
  pad_id: jax.Array,
  lift: _Lift,
) -> tuple[jax.Array, jax.Array]:
  """Tokens `[*P, B, N]` and lengths `[*P, B]` in the original order; one loop a bucket."""
  parts = [_decode_bucket(own, shared, config, bucket, max_new_tokens, end_ids, pad_id, lift) for bucket in buckets]
  tokens = jnp.concatenate([tokens for tokens, _ in parts], axis=-2)
  lengths = jnp.concatenate([lengths for _, lengths in parts], axis=-1)
  order = jnp.argsort(jnp.concatenate([jnp.asarray(bucket.rows) for bucket in buckets]))
  return jnp.take(tokens, order, axis=-2), jnp.take(lengths, order, axis=-1)


def _decode_bucket(
  own: Params,
  shared: Params,
  config: DecoderConfig,
  bucket: PromptBucket,
  max_new_tokens: int,
  end_ids: jax.Array,
  pad_id: jax.Array,
  lift: _Lift,
) -> tuple[jax.Array, jax.Array]:
  """Prefill and loop. Only what belongs to a candidate is lifted: the step count and the writing index are shared."""
  token_ids, prompt_lengths = jnp.asarray(bucket.token_ids), jnp.asarray(bucket.lengths)
  width = token_ids.shape[-1]

  def prefill(own: Params, token_ids: jax.Array, lengths: jax.Array) -> _Prefilled:
    return _prefill(combine_shared(own, shared), token_ids, lengths, config=config, room=max_new_tokens - 1)

  axis = 0 if token_ids.ndim == 3 else None
  prefilled = lift(prefill, in_axes=(0, axis, axis))(own, token_ids, prompt_lengths)
  own_layers = lift(functools.partial(_split_layers, config=config))(own["layers"])
  shared_layers = _split_layers(shared["layers"], config)

  def advance(
    own: Params, own_layers: list[Params], cache: _Cache, latest: jax.Array, starts: jax.Array, index: jax.Array
  ) -> tuple[_Cache, jax.Array]:
    layers = [combine_shared(mine, rest) for mine, rest in zip(own_layers, shared_layers, strict=True)]
    return _step(combine_shared(own, shared), layers, cache, latest, starts, index, config=config)

  step = lift(advance, in_axes=(0, 0, 0, 0, 0, None))

  # A loop in `jax.vmap` with a predicate for each candidate would copy the whole cache at each step, to keep that of
  # candidates which are done; here the predicate is one, and rows that are done only cease to change their answer.
  def unfinished(state: tuple[Any, ...]) -> jax.Array:
    index, _, _, _, done = state
    return (index < max_new_tokens) & ~done.all()

  def extend(state: tuple[Any, ...]) -> tuple[Any, ...]:
    index, cache, latest, answers, done = state
    cache, latest = step(own, own_layers, cache, latest, prefilled.starts, width + index - 1)
    latest = jnp.where(done, pad_id, latest)
    answers = jax.lax.dynamic_update_slice_in_dim(answers, latest[..., None], index, axis=-1)
    return index + 1, cache, latest, answers, done | jnp.isin(latest, end_ids)

  first = prefilled.tokens
  answers = jnp.full((*first.shape, max_new_tokens), pad_id).at[..., 0].set(first)
  state = (jnp.int32(1), prefilled.cache, first, answers, jnp.isin(first, end_ids))
  answers = jax.lax.while_loop(unfinished, extend, state)[3]
  ended = jnp.isin(answers, end_ids)
  return answers, jnp.where(ended.any(axis=-1), ended.argmax(axis=-1), max_new_tokens).astype(jnp.int32)


def _split_layers(layers: Params, config: DecoderConfig) -> list[Params]:
  """Every layer's weights for themselves, taken out once: a scan in the loop would copy them at every step."""
  if decoder.is_unstacked(layers):
    return list(layers)
  return [jax.tree.map(operator.itemgetter(layer), layers) for layer in range(config.num_layers)]


def _prefill(
  params: Params, token_ids: Int[Array, "B T"], lengths: Int[Array, " B"], *, config: DecoderConfig, room: int
) -> _Prefilled:
  """Runs the prompts of one candidate, moved to the right end of their rows."""
  width = token_ids.shape[1]
  starts = width - lengths
  offsets = jnp.arange(width)[None, :] - starts[:, None]
  positions = jnp.maximum(offsets, 0)
  shifted = jnp.take_along_axis(token_ids, positions, axis=1)
  visible = decoder.visibility(config, positions, (offsets >= 0).astype(jnp.int32))
  hidden = decoder.embed(params, shifted)
  hidden, (keys, values) = decoder.run_layers(params, config, hidden, positions, visible)
  keys = jnp.pad(keys.transpose(0, 1, 3, 4, 2), [(0, 0)] * 4 + [(0, room)])
  values = jnp.pad(values.transpose(0, 1, 3, 2, 4), [(0, 0)] * 3 + [(0, room), (0, 0)])
  cache = tuple((keys[layer], values[layer]) for layer in range(config.num_layers))
  return _Prefilled(cache, _likeliest(params, config, hidden[:, -1]), starts)


def _step(
  params: Params,
  layers: list[Params],
  cache: _Cache,
  tokens: Int[Array, " B"],
  starts: Int[Array, " B"],
  index: Int[Array, ""],
  *,
  config: DecoderConfig,
) -> tuple[_Cache, Int[Array, " B"]]:
  """Reads the latest token of each row at cache index `index`; returns the cache with it, and the next token."""
  capacity = cache[0][1].shape[2]
  places = jnp.arange(capacity)[None, :]
  visible = (places >= starts[:, None]) & (places <= index)
  if config.sliding_window is not None:
    visible &= index - places < config.sliding_window
  angles = decoder.rope_angles(config, (index - starts)[:, None])
  hidden = decoder.embed(params, tokens[:, None])
  extended = []
  for layer, (keys, values) in zip(layers, cache, strict=True):
    query, key, value = decoder.project(layer, config, hidden, angles)
    keys = jax.lax.dynamic_update_slice_in_dim(keys, key.transpose(0, 2, 3, 1), index, axis=3)
    values = jax.lax.dynamic_update_slice_in_dim(values, value.transpose(0, 2, 1, 3), index, axis=2)
    hidden += decoder.linear(layer["attention"]["output"], _attend(query, keys, values, visible))
    hidden += decoder.feed_forward(layer, config, hidden)
    extended.append((keys, values))
  return tuple(extended), _likeliest(params, config, hidden[:, 0])


def _attend(
  query: Float[Array, "B 1 H D"],
  keys: Float[Array, "B G D S"],
  values: Float[Array, "B G S D"],
  visible: Bool[Array, "B S"],
) -> Float[Array, "B 1 O"]:
  """`decoder.attend` of one query a row, in the cache's layout."""
  batch, groups, head_dim, _ = keys.shape
  grouped = query.reshape(batch, groups, -1, head_dim)
  scores = jnp.einsum("bgrd,bgds->bgrs", grouped, keys, preferred_element_type=jnp.float32)
  weights = decoder.attention_weights(scores / math.sqrt(head_dim), visible[:, None, None])
  return jnp.einsum("bgrs,bgsd->bgrd", weights.astype(values.dtype), values).reshape(batch, 1, -1)


def _likeliest(params: Params, config: DecoderConfig, hidden: Float[Array, "B d"]) -> Int[Array, " B"]:
  """The id of the highest logit, the lowest id among equals."""
  return jnp.argmax(decoder.unembed(params, config, hidden), axis=-1).astype(jnp.int32)
