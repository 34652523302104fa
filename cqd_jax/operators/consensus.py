"""Merging where the task vectors agree: each entry's sign is elected, and what is of the other sign has no say."""

import functools
from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.operators.arithmetic import (
  Convention,
  Granularity,
  check_choice,
  check_setting,
  check_task_vectors,
  check_weights,
  map_tensors,
  total,
)
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.order_statistics import count_of, kth_largest, magnitude_of
from cqd_jax.operators.sparsify import TrimGranularity, check_density, keeps_all, restored, trim, trim_tensor
from cqd_jax.trees import widen
from cqd_jax.types import Params

NEARLY_NOTHING = 1e-6
"""Of the squares of task vectors, and of sums of weights: where mergekit's SCE takes another way."""

SAME_VARIANCE = 2e-6
"""Variances that differ by this part are the same, to rounding."""


@needs_frame("elementwise")
def ties(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike,
  granularity: TrimGranularity = "kernel",
  normalize: bool = True,
  rescale: bool = False,
  convention: Convention = "paper",
) -> Params:
  """Merges T task vectors by TIES: trims each, elects a sign for each entry, and takes the mean of those that have it.

  It is `trim` of each task vector and `sign_consensus` of them all, which describe the settings. The factor lambda of
  the paper is the `scale` of `apply_task_vector`.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1, the paper.
    density: the share of entries of each task vector that is kept, in (0, 1]; may be traced. The paper has 0.2.
    granularity: what is ranked together for trimming: "kernel", or the whole "model" as in the paper.
    normalize: whether the mean is taken, or the sum.
    rescale: whether each tensor is scaled, once trimmed, to the sum of magnitudes that it had; an option of mergekit.
    convention: as for `sign_consensus`.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, `weights` is no vector of T finite numbers, or a
      setting is out of range.

  Reference: Yadav et al. 2023, arXiv:2306.01708, algorithm 1. It ranks the whole model together; that is
  `granularity="model"`. mergekit keeps exactly so many entries, `trim` also those as large as the last of them.
  """
  originals, size = check_task_vectors(task_vectors)
  task_vectors = originals
  check_density(density)
  check_choice("granularity", granularity, get_args(TrimGranularity))
  check_choice("convention", convention, get_args(Convention))
  shares = check_weights(weights, size)
  if granularity == "model":
    task_vectors = jax.vmap(functools.partial(trim, density=density, granularity=granularity))(task_vectors)
  trims = granularity == "kernel" and not keeps_all(density)

  def merge(tensors: jax.Array, originals: jax.Array) -> jax.Array:
    parts = [trim_tensor(tensors[t], density) if trims else tensors[t] for t in range(size)]
    if rescale:
      parts = [restored(part, originals[t]) for t, part in enumerate(parts)]
    return agree(parts, shares, normalize=normalize, convention=convention).astype(tensors.dtype)

  return map_tensors(merge, task_vectors, originals)


@needs_frame("elementwise")
def sign_consensus(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  normalize: bool = True,
  convention: Convention = "paper",
) -> Params:
  """Elects a sign for each entry and merges the task vectors that have it there.

  An entry's sign is that of the weighted sum of all T. The result is the sum of the weighted entries of that sign, over
  the sum of their weights' magnitudes: a weighted mean, in which zeros do not count. A task vector with a negative
  weight takes part as its negative.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    normalize: whether the weighted mean is taken; False: the weighted sum.
    convention: what the paper leaves open. "paper": where the weighted sum is exactly 0 no sign is elected, and the
      result is 0. "mergekit": there plus is elected; and the divisor is the sum of weights with their signs, so that a
      negative weight's minus cancels, or 1 where that sum is 0.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Where nobody has the elected
    sign it is 0. Where one of the T is NaN the entry is NaN.

  Raises:
    ValueError: as `ties`.

  Reference: Yadav et al. 2023, arXiv:2306.01708, algorithm 1, steps 2 and 3; without weights.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  check_choice("convention", convention, get_args(Convention))
  weights = check_weights(weights, size)

  def merge(leaf: jax.Array) -> jax.Array:
    return agree(leaf, weights, normalize=normalize, convention=convention).astype(leaf.dtype)

  return jax.tree.map(merge, task_vectors)


def agree(
  tensors: Sequence[jax.Array] | jax.Array, weights: jax.Array, *, normalize: bool, convention: Convention
) -> jax.Array:
  """`sign_consensus` of T tensors, in float32; one pass over them."""
  size = len(tensors)
  terms = [weights[t] * widen(tensors[t]) for t in range(size)]
  mass = total(terms)
  elected = jnp.where(mass >= 0, 1.0, -1.0) if convention == "mergekit" else jnp.sign(mass)
  agrees = [jnp.sign(term) * elected > 0 for term in terms]
  merged = total([jnp.where(says, term, 0.0) for says, term in zip(agrees, terms, strict=True)])
  if normalize:
    counted = weights if convention == "mergekit" else jnp.abs(weights)
    divisor = total([jnp.where(says, counted[t], 0.0) for t, says in enumerate(agrees)])
    merged = merged / jnp.where(divisor == 0, 1.0, divisor)
  return jnp.where(jnp.isnan(mass), jnp.nan, merged)


@needs_frame("elementwise")
def sce(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  select_topk: ArrayLike = 1.0,
  convention: Convention = "paper",
) -> Params:
  """Merges task vectors where they differ most, each weighted by its squares there: select, calculate, erase.

  Of each tensor the entries are selected whose variance over the T task vectors is largest, as many as the share
  `select_topk` of those where it is not 0, and with the last of them those of the same variance to rounding. Each task
  vector then weighs as the sum of its squares there. And of each entry only what has the sign of the sum of all T takes
  part, in a weighted mean.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]` factors of the weights that are found; may be traced. None: all 1, the paper.
    select_topk: the share of entries to select, in (0, 1]; may be traced. The paper has 0.1.
    convention: "mergekit": where the mean squares of all T sum to less than 1e-6, as in most fine-tuning, all weigh
      alike; a sum of weights below 1e-6 counts as that; and where the sum of an entry is exactly 0 plus is elected.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Zeros, and with `select_topk`
    below 1 equal ones (or one) too, give 0: nothing differs. Opposite ones cancel. A NaN ranks above all variances and
    makes its tensor NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or a setting is out of range.

  Reference: Wan et al. 2024, FuseChat, arXiv:2408.07990.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  check_density(select_topk)
  check_choice("convention", convention, get_args(Convention))
  everything = keeps_all(select_topk)

  def merge(tensors: jax.Array) -> jax.Array:
    parts = [widen(tensors[t]) for t in range(size)]
    if not everything:
      mean = total(parts) / size
      spread = total([(part - mean) ** 2 for part in parts]) / size
      chosen = _select(spread, select_topk)
      parts = [jnp.where(chosen, part, 0.0) for part in parts]
    squares = jnp.stack([jnp.mean(part * part) for part in parts])
    return _erase(parts, factors, squares, convention).astype(tensors.dtype)

  return map_tensors(merge, task_vectors)


def _select(spread: jax.Array, share: ArrayLike) -> jax.Array:
  """Where a variance is among the largest of a share of those that are not 0."""
  nonzero = jnp.sum(spread != 0, dtype=jnp.uint32)
  # The floor of a product in float32 would miss a count by one where the product is a whole number.
  kept = jnp.floor(share * nonzero.astype(jnp.float32) * (1 + 2e-7)).astype(jnp.uint32)
  count_of(1.0, spread.size)
  smallest = magnitude_of(kth_largest([spread], jnp.minimum(kept, nonzero)))
  # The compiler may compute a variance in two places, and round it in two ways; the last one must not miss itself.
  return ~(spread < smallest * (1 - SAME_VARIANCE)) & (kept > 0)


def _erase(parts: Sequence[jax.Array], factors: jax.Array, squares: jax.Array, convention: Convention) -> jax.Array:
  """The weighted mean of what has the sign of the sum."""
  size, all_squares = len(parts), jnp.sum(squares)
  none = all_squares < NEARLY_NOTHING if convention == "mergekit" else all_squares == 0
  weights = factors * jnp.where(none, 1.0 / size, squares / jnp.where(none, 1.0, all_squares))
  mass = total(parts)
  elected = jnp.where(mass >= 0, 1.0, -1.0) if convention == "mergekit" else jnp.sign(mass)
  agrees = [jnp.sign(part) * elected > 0 for part in parts]
  merged = total([jnp.where(says, weights[t] * parts[t], 0.0) for t, says in enumerate(agrees)])
  divisor = total([jnp.where(says, weights[t], 0.0) for t, says in enumerate(agrees)])
  if convention == "mergekit":
    divisor = jnp.maximum(divisor, NEARLY_NOTHING)
  return jnp.where(jnp.isnan(mass), jnp.nan, merged / jnp.where(divisor == 0, 1.0, divisor))


@needs_frame("elementwise")
def magmax(task_vectors: Params, weights: ArrayLike | None = None) -> Params:
  """Takes each entry from the task vector in which it is largest in magnitude.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]` factors of the task vectors before they are compared; may be traced. None: all 1, the paper.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Of equal magnitudes the first
    is taken, so opposite ones give the first. Where one of the T is NaN the entry is NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or `weights` is no vector of T finite numbers.

  Reference: Marczak et al. 2024, arXiv:2407.06322.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)

  def larger(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where((jnp.abs(other) > jnp.abs(one)) | jnp.isnan(other), other, one)

  def merge(leaf: jax.Array) -> jax.Array:
    terms = [factors[t] * widen(leaf[t]) for t in range(size)]
    return functools.reduce(larger, terms).astype(leaf.dtype)

  return jax.tree.map(merge, task_vectors)


@needs_frame("elementwise")
def ram(task_vectors: Params, weights: ArrayLike | None = None, *, epsilon: ArrayLike = 1e-5) -> Params:
  """The mean of those task vectors that change an entry at all.

  A task vector is active where an entry's magnitude is above `epsilon`. The result is the weighted mean of the active
  ones, so that what one task vector has on its own is kept whole.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`; may be traced. None: all 1, the paper.
    epsilon: at least 0; may be traced. It is absolute: in bfloat16 far below what weights resolve.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Where nobody is active it is
    0; opposite ones cancel. A NaN makes its entry NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or a setting is out of range.

  Reference: Yuan et al. 2026, arXiv:2601.13572.
  """
  return _active_mean(task_vectors, weights, epsilon, None, "kernel")


@needs_frame("elementwise")
def ramplus_tl(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  r: ArrayLike = 0.1,
  alpha: ArrayLike = 0.2,
  epsilon: ArrayLike = 1e-5,
  granularity: Granularity = "kernel",
) -> Params:
  """`ram`, with what one task vector changes alone enlarged by how much it shares with others.

  Of a task vector, with `shared` entries that others change too and `alone` entries that only it changes, the latter
  are multiplied by `1 + r min(shared / alone, alpha)`, `alone` being taken as at least `epsilon`.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`; may be traced. None: all 1, the paper.
    r: strength, at least 0; may be traced.
    alpha: bound of the ratio, at least 0; may be traced.
    epsilon: above which magnitude an entry is changed, at least 0; may be traced.
    granularity: what is counted together: each tensor ("tl": tensor-local), or the whole "model".

  Returns:
    As `ram`.

  Raises:
    ValueError: as `ram`.

  Reference: Yuan et al. 2026, arXiv:2601.13572 (RAM+).
  """
  check_setting("r", r, low=0.0)
  check_setting("alpha", alpha, low=0.0)
  check_choice("granularity", granularity, get_args(Granularity))
  return _active_mean(task_vectors, weights, epsilon, (r, alpha), granularity)


def _active_mean(
  task_vectors: Params,
  weights: ArrayLike | None,
  epsilon: ArrayLike,
  enlarged: tuple[ArrayLike, ArrayLike] | None,
  granularity: Granularity,
) -> Params:
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  check_setting("epsilon", epsilon, low=0.0)

  def activity(tensors: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    active = [jnp.abs(widen(tensors[t])) > epsilon for t in range(size)]
    return active, total([own.astype(jnp.int32) for own in active])

  def counts(tensors: jax.Array) -> jax.Array:
    active, number = activity(tensors)
    alone = [jnp.sum(own & (number == 1), dtype=jnp.float32) for own in active]
    shared = [jnp.sum(own & (number > 1), dtype=jnp.float32) for own in active]
    return jnp.stack([jnp.stack(alone), jnp.stack(shared)])

  def merge(tensors: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    active, number = activity(tensors)
    factor = [jnp.ones(())] * size
    if enlarged is not None:
      alone, shared = counts(tensors) if counted is None else counted
      ratio = jnp.minimum(shared / jnp.maximum(alone, epsilon), enlarged[1])
      factor = list(1.0 + enlarged[0] * jnp.where(jnp.isnan(ratio), 0.0, ratio))
    parts = [jnp.where(own, widen(tensors[t]), 0.0) for t, own in enumerate(active)]
    mean = total([factors[t] * part for t, part in enumerate(parts)])
    divisor = total([jnp.where(own, factors[t], 0.0) for t, own in enumerate(active)])
    single = total([factor[t] * part for t, part in enumerate(parts)])
    merged = jnp.where(number > 1, mean / jnp.where(divisor == 0, 1.0, divisor), single)
    broken = total([widen(tensors[t]) for t in range(size)])
    return jnp.where(jnp.isnan(broken), jnp.nan, merged).astype(tensors.dtype)

  if enlarged is None or granularity == "kernel":
    return map_tensors(merge, task_vectors)
  counted = total([counts(leaf) for leaf in jax.tree.leaves(task_vectors)])
  return jax.tree.map(lambda leaf: merge(leaf, counted), task_vectors)
