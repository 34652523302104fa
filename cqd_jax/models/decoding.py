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
from cqd_jax.types import Params


class PromptBucket(NamedTuple):
  """Prompts of about one length, padded to one static shape; a pytree of int32 arrays.

  Attributes:
    rows: `[b]` the prompts' places in the original order.
    token_ids: `[b, T]` tokens, then padding.
    lengths: `[b]` number of tokens, from 1 to T.
  """

  rows: Any
  token_ids: Any
  lengths: Any


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


def bucket_prompts(
  prompts: Sequence[Sequence[int] | np.ndarray], *, num_buckets: int, pad_id: int = 0, multiple_of: int = 4
) -> list[PromptBucket]:
  """Sorts prompts by length and parts them into buckets of equal size, each padded to its own longest prompt.

  Short prompts then do not pay for long ones, neither in the prefill nor in the cache that each step reads. Each
  bucket is compiled for itself.

  Args:
    prompts: B non-empty lists of token ids.
    num_buckets: how many buckets at most; there are no empty ones.
    pad_id: fills the rows; its value does not matter.
    multiple_of: padded lengths are rounded up to a multiple of this, so that fewer shapes are compiled.

  Returns:
    Buckets of NumPy arrays, short prompts first.

  Raises:
    ValueError: if there is no prompt, a prompt is empty, or `num_buckets` or `multiple_of` is below 1.
  """
  for name, value in (("num_buckets", num_buckets), ("multiple_of", multiple_of)):
    if value < 1:
      raise ValueError(f"{name}: expected at least 1, got {value}")
  if not prompts:
    raise ValueError("prompts: expected at least one")
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  if not lengths.all():
    raise ValueError(f"prompts[{lengths.argmin()}]: expected at least one token, got an empty prompt")
  buckets = []
  for rows in np.array_split(np.argsort(lengths, kind="stable"), min(num_buckets, len(prompts))):
    width = -(-int(lengths[rows].max()) // multiple_of) * multiple_of
    token_ids = np.full((len(rows), width), pad_id, np.int32)
    for row, prompt in zip(token_ids, rows, strict=True):
      row[: lengths[prompt]] = prompts[prompt]
    buckets.append(PromptBucket(rows.astype(np.int32), token_ids, lengths[rows]))
  return buckets


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
  settings = _checked_settings(config, [bucket], max_new_tokens, end_ids, pad_id)
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
  """What `greedy_decode` gives, for P candidates on the same B prompts, in one compiled call.

  Args:
    params: leaves `[P, ...]`: the candidates' weights. Where candidates share a base model (a matrix is a
      `cqd_jax.low_rank.LowRankUpdate`, as `CoreBasis.apply` gives it) the core alone has the leading axis.
    config: the decoder, the same for all.
    buckets: the prompts, e.g. of `bucket_prompts`; their `rows` are together 0 to B-1.
    max_new_tokens: N, static, at least 1.
    end_ids: ids any of which ends an answer.
    pad_id: what follows an end token in the result.
    group_size: how many candidates are decoded side by side; divides P. Groups run one after the other. 1 is best
      where one candidate's B rows fill the machine; more where steps wait for memory or launches, at `group_size` times
      the memory of the cache. Candidates of one base read it once a group and step.

  Returns:
    Tokens `[P, B, N]` int32 and lengths `[P, B]` int32 as of `greedy_decode`, prompts in their original order.

  Raises:
    ValueError: if shapes do not agree, the rows are no permutation, or a setting is outside its range.
  """
  own, shared = partition_shared(params)
  size = check_population(own, "params")
  if group_size < 1 or size % group_size:
    raise ValueError(f"group_size: expected a divisor of the {size} candidates, got {group_size}")
  settings = _checked_settings(config, buckets, max_new_tokens, end_ids, pad_id)
  return _decode_population(own, shared, config, list(buckets), *settings, group_size)


def _checked_settings(
  config: DecoderConfig, buckets: Sequence[PromptBucket], max_new_tokens: int, end_ids: Sequence[int], pad_id: int
) -> tuple[int, np.ndarray, np.ndarray]:
  """The one static setting, and those that are arrays, lest they compile anew; raises as the public functions say."""
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
  outside = [end_id for end_id in end_ids if not 0 <= end_id < config.vocab_size]
  if outside:
    raise ValueError(f"end_ids: expected ids in [0, {config.vocab_size}), got {outside}")
  if not buckets:
    raise ValueError("buckets: expected at least one")
  for rows, token_ids, lengths in buckets:
    if token_ids.ndim != 2 or lengths.shape != token_ids.shape[:1] or rows.shape != lengths.shape:
      raise ValueError(f"prompts: expected tokens [B, T] and lengths [B], got {token_ids.shape} and {lengths.shape}")
    if not isinstance(lengths, jax.core.Tracer) and not ((lengths >= 1) & (lengths <= token_ids.shape[1])).all():
      raise ValueError(f"prompt_lengths: expected lengths in [1, {token_ids.shape[1]}], got {np.asarray(lengths)}")
  if not any(isinstance(bucket.rows, jax.core.Tracer) for bucket in buckets):
    rows = np.sort(np.concatenate([bucket.rows for bucket in buckets]))
    if not np.array_equal(rows, np.arange(len(rows))):
      raise ValueError(f"buckets: expected rows that are together 0 to {len(rows) - 1}, each once")
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
  def decode(candidates: Params, lift: _Lift) -> tuple[jax.Array, jax.Array]:
    return _decode_buckets(candidates, shared, config, buckets, max_new_tokens, end_ids, pad_id, lift)

  if group_size == 1:
    return jax.lax.map(lambda candidate: decode(candidate, _one), own)
  grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, group_size, *leaf.shape[1:]), own)
  tokens, lengths = jax.lax.map(lambda group: decode(group, jax.vmap), grouped)
  return tokens.reshape(-1, *tokens.shape[2:]), lengths.reshape(-1, *lengths.shape[2:])


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
  width = bucket.token_ids.shape[1]
  token_ids, prompt_lengths = jnp.asarray(bucket.token_ids), jnp.asarray(bucket.lengths)

  def prefill(own: Params) -> _Prefilled:
    return _prefill(combine_shared(own, shared), token_ids, prompt_lengths, config=config, room=max_new_tokens - 1)

  prefilled = lift(prefill)(own)
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
