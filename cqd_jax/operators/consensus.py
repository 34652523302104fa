"""Merging where the task vectors agree: each entry's sign is elected, and what is of the other sign has no say."""

import functools
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cqd_jax.checks import check_float_leaves, check_population
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.sparsify import TrimGranularity, trim
from cqd_jax.trees import as_arrays, widen
from cqd_jax.types import Params

Convention: TypeAlias = Literal["paper", "mergekit"]


@needs_frame("elementwise")
def ties(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: float,
  granularity: TrimGranularity = "kernel",
  normalize: bool = True,
  convention: Convention = "paper",
) -> Params:
  """Merges T task vectors by TIES: trims each, elects a sign for each entry, and takes the mean of those that have it.

  It is `trim` of each task vector and `sign_consensus` of them all, which describe the settings. The factor lambda of
  the paper is the `scale` of `apply_task_vector`.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1, the paper.
    density: the share of entries of each task vector that is kept, in (0, 1]; static. The paper has 0.2.
    granularity: what is ranked together for trimming: "kernel", or the whole "model" as in the paper.
    normalize: whether the mean is taken, or the sum.
    convention: "paper" or "mergekit".

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, `weights` is no vector of T finite numbers, or a
      setting is out of range.

  Reference: Yadav et al. 2023, arXiv:2306.01708, algorithm 1. It ranks the whole model together; that is
  `granularity="model"`. mergekit keeps exactly so many entries, `trim` also those as large as the last of them.
  """
  size = _check_task_vectors(task_vectors)
  _check_weights(weights, size)
  trimmed = jax.vmap(functools.partial(trim, density=density, granularity=granularity))(as_arrays(task_vectors))
  return sign_consensus(trimmed, weights, normalize=normalize, convention=convention)


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
  size = _check_task_vectors(task_vectors)
  if convention not in get_args(Convention):
    raise ValueError(f"convention: expected one of {', '.join(get_args(Convention))}, got {convention!r}")
  weights = _check_weights(weights, size)
  counted = weights if convention == "mergekit" else jnp.abs(weights)

  def merge(leaf: jax.Array) -> jax.Array:
    # T terms written out fuse into one pass over the leaf; XLA's reduction over a leading axis is far slower on a CPU.
    terms = [weights[t] * widen(leaf[t]) for t in range(size)]
    mass = functools.reduce(jnp.add, terms)
    elected = jnp.where(mass >= 0, 1.0, -1.0) if convention == "mergekit" else jnp.sign(mass)
    agrees = [jnp.sign(term) * elected > 0 for term in terms]
    total = functools.reduce(jnp.add, (jnp.where(says, term, 0.0) for says, term in zip(agrees, terms, strict=True)))
    if normalize:
      divisor = functools.reduce(jnp.add, (jnp.where(says, counted[t], 0.0) for t, says in enumerate(agrees)))
      total = total / jnp.where(divisor == 0, 1.0, divisor)
    return jnp.where(jnp.isnan(mass), jnp.nan, total).astype(leaf.dtype)

  return jax.tree.map(merge, as_arrays(task_vectors))


def _check_task_vectors(task_vectors: Params) -> int:
  """T; raises unless all leaves are floats with a common leading axis that is not empty."""
  check_float_leaves(task_vectors, "task_vectors")
  size = check_population(task_vectors, "task_vectors")
  if size == 0:
    raise ValueError("task_vectors: expected at least one individual on the leading axis, got 0")
  return size


def _check_weights(weights: ArrayLike | None, size: int) -> jax.Array:
  """The weights as float32 `[T]`; raises unless they are that many, and finite as far as that is known."""
  if weights is None:
    return jnp.ones(size, jnp.float32)
  if np.shape(weights) != (size,):
    raise ValueError(f"weights: expected one weight per task vector, shape {(size,)}, got shape {np.shape(weights)}")
  if not isinstance(weights, jax.core.Tracer) and not np.isfinite(np.asarray(weights, np.float64)).all():
    raise ValueError(f"weights: expected finite numbers, got {np.asarray(weights)}")
  return jnp.asarray(weights, jnp.float32)
