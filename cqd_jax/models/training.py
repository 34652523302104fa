"""Fine-tuning: sequences packed into rows, cross-entropy on the answers, a compiled AdamW step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from cqd_jax.models.config import DecoderConfig
from cqd_jax.models.decoder import forward
from cqd_jax.trees import is_matrix, map_with_path
from cqd_jax.types import Params


class Batch(NamedTuple):
  """Packed rows, `[B, T]` each; a pytree of NumPy or JAX arrays, so `jax.tree.map` slices or stacks it.

  Attributes:
    token_ids: int32 tokens; 0 at padding.
    segment_ids: int32, counted from 1 in each row; 0 at padding. Tokens see only their own segment.
    positions: int32, counted from 0 in each segment.
    targets: int32, the token that follows in the segment; 0 where `loss_mask` is 0.
    loss_mask: float32, 1 where `targets` is a token to be learnt, else 0.
  """

  token_ids: Any
  segment_ids: Any
  positions: Any
  targets: Any
  loss_mask: Any


TrainStep: TypeAlias = Callable[[Params, optax.OptState, Batch, Any], tuple[Params, optax.OptState, jax.Array]]
"""`(params, optimizer_state, batch, learning_rate) -> (params, optimizer_state, loss)`."""


def pack(sequences: Sequence[Sequence[int]], answer_masks: Sequence[Sequence[bool]], row_length: int) -> Batch:
  """Packs sequences into rows: longest first, each into the fullest row that still has room for it.

  Args:
    sequences: token ids of each sequence, from 1 to `row_length` of them.
    answer_masks: for each token whether it is to be learnt; the first token of a sequence is never predicted, so it
      is not learnt whatever its mask says.
    row_length: T.

  Returns:
    NumPy rows `[B, T]` with as many rows as it takes; every sequence is in one of them, whole.

  Raises:
    ValueError: if a sequence is empty or longer than a row, or its mask has another length.
  """
  _check_sequences(sequences, answer_masks, row_length)
  rows: list[list[int]] = []
  room: list[int] = []
  for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
    length = len(sequences[index])
    fitting = [row for row, free in enumerate(room) if free >= length]
    row = min(fitting, key=lambda row: room[row], default=len(rows))
    if row == len(rows):
      rows.append([])
      room.append(row_length)
    rows[row].append(index)
    room[row] -= length
  arrays = {name: np.zeros((len(rows), row_length), np.int32) for name in Batch._fields}
  arrays["loss_mask"] = arrays["loss_mask"].astype(np.float32)
  for row, members in enumerate(rows):
    start = 0
    for segment, index in enumerate(members, 1):
      tokens = np.asarray(sequences[index], np.int32)
      stop, learnt = start + len(tokens), np.asarray(answer_masks[index], bool)[1:]
      arrays["token_ids"][row, start:stop] = tokens
      arrays["segment_ids"][row, start:stop] = segment
      arrays["positions"][row, start:stop] = np.arange(len(tokens))
      arrays["targets"][row, start : stop - 1] = np.where(learnt, tokens[1:], 0)
      arrays["loss_mask"][row, start : stop - 1] = learnt
      start = stop
  return Batch(**arrays)


def _check_sequences(
  sequences: Sequence[Sequence[int]], answer_masks: Sequence[Sequence[bool]], row_length: int
) -> None:
  if len(answer_masks) != len(sequences):
    raise ValueError(f"answer_masks: expected one for each of {len(sequences)} sequences, got {len(answer_masks)}")
  for index, (sequence, mask) in enumerate(zip(sequences, answer_masks, strict=True)):
    if not 1 <= len(sequence) <= row_length:
      raise ValueError(f"sequences[{index}]: expected 1 to row_length={row_length} tokens, got {len(sequence)}")
    if len(mask) != len(sequence):
      raise ValueError(f"answer_masks[{index}]: expected {len(sequence)} entries, got {len(mask)}")


def loss(params: Params, config: DecoderConfig, batch: Batch) -> Float[Array, ""]:
  """Mean cross-entropy in nats over the batch's answer tokens, float32; 0 if there are none. Differentiable."""
  losses = _token_losses(params, config, batch)
  return jnp.sum(losses * batch.loss_mask) / jnp.maximum(jnp.sum(batch.loss_mask), 1.0)


def losses_of_groups(
  params: Params, config: DecoderConfig, batch: Batch, num_groups: int
) -> Float[Array, " num_groups"]:
  """`loss` of each of equally many rows that follow one another, `[num_groups]` float32, by one pass over all."""
  losses = (_token_losses(params, config, batch) * batch.loss_mask).reshape(num_groups, -1).sum(axis=1)
  return losses / jnp.maximum(jnp.reshape(batch.loss_mask, (num_groups, -1)).sum(axis=1), 1.0)


def _token_losses(params: Params, config: DecoderConfig, batch: Batch) -> Float[Array, "B T"]:
  logits = forward(
    params, config, jnp.asarray(batch.token_ids), segment_ids=batch.segment_ids, positions=batch.positions
  )
  losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
  return losses


def make_optimizer(
  *, weight_decay: float = 0.01, b1: float = 0.9, b2: float = 0.999, max_norm: float = 1.0
) -> optax.GradientTransformation:
  """AdamW without its learning rate, after clipping the gradient's global norm; decays what has two axes per layer.

  Norm scales and biases are not decayed (Loshchilov & Hutter 2019, arXiv:1711.05101, leave the choice open).
  """
  return optax.chain(
    optax.clip_by_global_norm(max_norm),
    optax.scale_by_adam(b1=b1, b2=b2),
    optax.add_decayed_weights(weight_decay, mask=_decayed),
  )


def _decayed(params: Params) -> Params:
  return map_with_path(is_matrix, params)


def make_train_step(config: DecoderConfig, optimizer: optax.GradientTransformation) -> TrainStep:
  """One compiled step of gradient descent on `loss`.

  The learning rate is an argument, so that base model and experts, warm-up and decay, share one compilation.

  Args:
    config: the decoder.
    optimizer: gives the update for a learning rate of 1, uphill: `make_optimizer`. Its state comes from
      `optimizer.init(params)`.

  Returns:
    `(params, optimizer_state, batch, learning_rate) -> (params, optimizer_state, loss before the step)`. The params
    and the state that are handed in are DONATED: their memory is reused, they cannot be read afterwards.
  """

  def train_step(
    params: Params, state: optax.OptState, batch: Batch, learning_rate: Any
  ) -> tuple[Params, optax.OptState, jax.Array]:
    value, gradient = jax.value_and_grad(loss)(params, config, batch)
    update, state = optimizer.update(gradient, state, params)
    update = jax.tree.map(lambda leaf: (-learning_rate * leaf).astype(leaf.dtype), update)
    return optax.apply_updates(params, update), state, value

  return jax.jit(train_step, donate_argnums=(0, 1))
