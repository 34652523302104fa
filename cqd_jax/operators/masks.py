"""Masks: which entries of a merge belong to whom, to merge better by it, or to have each task vector back out of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.operators.arithmetic import check_setting, check_task_vectors, check_weights, total, weighted_sum
from cqd_jax.operators.frames import needs_frame
from cqd_jax.trees import widen
from cqd_jax.types import Params


@needs_frame("elementwise")
def tall_masks(task_vectors: Params, merged: Params, *, threshold: ArrayLike = 0.4) -> Params:
  """Where a merge serves each task vector: its entry is large beside what the others add to the merge.

  That is where `|x_t| >= threshold |merged - x_t|`.

  Args:
    task_vectors: float leaves `[T, ...]`.
    merged: of all of them; float leaves `[...]`, same structure.
    threshold: lambda of the paper, which tunes it per task from 0.2 to 0.6. At least 0; a scalar, or `[T]`.

  Returns:
    bool leaves `[T, ...]`. Zeros are in the mask only where the merge is zero too. A NaN is in no mask.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or shapes do not fit.

  Reference: Wang et al. 2024, arXiv:2405.07813.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  bounds = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (size,))

  def mask(tensors: jax.Array, whole: jax.Array) -> jax.Array:
    if tensors.shape[1:] != whole.shape:
      raise ValueError(f"merged: expected a leaf of shape {tensors.shape[1:]}, got {whole.shape}")
    wide, other = widen(tensors), widen(whole)
    return jnp.stack([jnp.abs(wide[t]) >= bounds[t] * jnp.abs(other - wide[t]) for t in range(size)])

  return jax.tree.map(mask, task_vectors, merged)


@needs_frame("elementwise")
def consensus_merge(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  threshold: ArrayLike = 0.4,
  agree: int = 2,
) -> Params:
  """The weighted sum of task vectors, only where it serves several of them: entries of one or none are left out.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1, the paper.
    threshold: as for `tall_masks`; may be traced.
    agree: in how many masks an entry has to be, at least 0; static. The paper has 2.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Zeros give zeros, opposite
    ones cancel, equal ones give their weighted sum (of T at most `1 + 1 / threshold`; else nothing: each is small
    beside what the others add). One alone is left only with `agree` 1. A NaN is in no mask, so its entry is 0.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or a setting is out of range.

  Reference: Wang et al. 2024, arXiv:2405.07813 (Consensus Task Arithmetic). Other merges take `tall_masks`.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  check_setting("agree", agree, low=0.0)

  def merge(tensors: jax.Array) -> jax.Array:
    merged = weighted_sum(factors, tensors)
    masks = tall_masks(tensors, merged, threshold=threshold)
    number = total([masks[t].astype(jnp.int32) for t in range(size)])
    return jnp.where(number >= agree, merged, 0.0).astype(tensors.dtype)

  return jax.tree.map(merge, task_vectors)


class UnifiedTaskVector(NamedTuple):
  """One task vector, and what it takes to make each of T out of it again, nearly.

  Attributes:
    unified: leaves `[...]`, in the dtypes of the task vectors.
    masks: bool leaves `[T, ...]`.
    scales: float32 `[T]`.
  """

  unified: Params
  masks: Params
  scales: jax.Array

  def task_vector(self, t: ArrayLike) -> Params:
    """What stands for the t-th task vector; `t` may be traced."""

    def pick(leaf: jax.Array, masks: jax.Array) -> jax.Array:
      return jnp.where(masks[t], self.scales[t] * widen(leaf), 0.0).astype(leaf.dtype)

    return jax.tree.map(pick, self.unified, self.masks)


@needs_frame("elementwise")
def emr(task_vectors: Params) -> UnifiedTaskVector:
  """Elects one task vector, and gives each task a mask and a scale: elect, mask and rescale.

  An entry has the sign of the sum of all T, and of those with that sign the largest magnitude. A task's mask is where
  its sign is that; its scale gives what the mask leaves the task's own sum of magnitudes.

  Args:
    task_vectors: float leaves `[T, ...]`.

  Returns:
    The unified task vector, T masks of a bit an entry, and T scales; computed in float32. Where the sum of an entry is
    exactly 0 nothing is elected, so opposite ones give zeros; equal ones, and one, give themselves. A task vector with
    an empty mask has scale 1. A NaN makes its entry NaN, is in no mask, and makes the scale of its own NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty.

  Reference: Huang et al. 2024, arXiv:2405.17461.
  """
  task_vectors, size = check_task_vectors(task_vectors)

  def elect(tensors: jax.Array) -> jax.Array:
    wide = [widen(tensors[t]) for t in range(size)]
    mass = total(wide)
    sign = jnp.sign(mass)
    largest = jnp.zeros_like(mass)
    for own in wide:
      largest = jnp.maximum(largest, jnp.where(own * sign > 0, jnp.abs(own), 0.0))
    return jnp.where(jnp.isnan(mass), jnp.nan, sign * largest).astype(tensors.dtype)

  unified = jax.tree.map(elect, task_vectors)
  masks = jax.tree.map(lambda tensors, whole: jnp.sign(tensors) * jnp.sign(whole)[None] > 0, task_vectors, unified)

  def magnitude(leaves: list[jax.Array]) -> jax.Array:
    return total([jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves])

  def scale(t: int) -> jax.Array:
    own = [jnp.abs(widen(leaf[t])) for leaf in jax.tree.leaves(task_vectors)]
    left = [
      jnp.where(mask[t], jnp.abs(widen(whole)), 0.0)
      for mask, whole in zip(jax.tree.leaves(masks), jax.tree.leaves(unified), strict=True)
    ]
    divisor = magnitude(left)
    return jnp.where(divisor == 0, 1.0, magnitude(own) / jnp.where(divisor == 0, 1.0, divisor))

  return UnifiedTaskVector(unified, masks, jnp.stack([scale(t) for t in range(size)]))
