"""K task vectors become one: softmax-weighted, averaged, or summed and scaled."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.checks import check_float_leaves, check_population
from cqd_jax.operators.arithmetic import check_setting, check_sum, check_task_vectors, check_weights
from cqd_jax.operators.frames import needs_frame
from cqd_jax.trees import as_arrays, widen
from cqd_jax.types import Params

NO_SUM = 1e-8
"""A sum of weights below this divides nothing."""


@needs_frame("linear")
def aggregate(task_vectors: Params, fitnesses: ArrayLike) -> Params:
  """Sums task vectors with the softmax of their fitnesses as weights.

  The final step of CycleQD: the best individual of each archive, weighted by how good it is.

  Args:
    task_vectors: float leaves `[K, ...]`.
    fitnesses: `[K]`, any real dtype. A fitness that is not finite (NaN, or the -inf of an empty archive) has weight
      0, and nothing that its leaves hold reaches the result. Where none is finite the result is 0: the base model.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32.

  Raises:
    ValueError: if `fitnesses` is not a vector, or its length is not that of all leaves' leading axis.

  Reference: Kuroki et al. 2025, arXiv:2410.14735, section 3.5 (model aggregation).
  """
  check_float_leaves(task_vectors, "task_vectors")
  task_vectors, fitnesses = as_arrays(task_vectors), jnp.asarray(fitnesses)
  if fitnesses.ndim != 1:
    raise ValueError(f"fitnesses: expected one fitness a task vector, shape [K], got shape {fitnesses.shape}")
  check_population(task_vectors, "task_vectors", fitnesses.shape[0])
  fitnesses = fitnesses.astype(jnp.float32)
  finite = jnp.isfinite(fitnesses)
  return _weighted_sum(_softmax(fitnesses, finite), finite, task_vectors)


@needs_frame("linear")
def uniform_average(task_vectors: Params) -> Params:
  """The mean of K task vectors: leaves `[K, ...]` to `[...]`, dtypes kept, summed in float32.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty.

  Reference: Wortsman et al. 2022, "Model soups", arXiv:2203.05482.
  """
  return task_arithmetic(task_vectors, 1.0 / max(check_population(task_vectors, "task_vectors"), 1))


@needs_frame("linear")
def task_arithmetic(
  task_vectors: Params, scale: ArrayLike = 1.0, weights: ArrayLike | None = None, *, normalize: bool = False
) -> Params:
  """The sum of K task vectors times `scale`: leaves `[K, ...]` to `[...]`, dtypes kept, summed in float32.

  Args:
    task_vectors: float leaves `[K, ...]`, K at least 1.
    scale: scalar; may be traced. 1/K gives the mean.
    weights: `[K]`, any real dtype; may be traced. None: all 1, the paper.
    normalize: whether the sum is divided by that of the weights, where that is not 0.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, `scale` is no finite scalar, or `weights` is no vector
      of K finite numbers.

  Reference: Ilharco et al. 2023, arXiv:2212.04089.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  check_setting("scale", scale)
  factors = check_weights(weights, size)
  if normalize:
    mass = jnp.sum(factors)
    factors = factors / jnp.where(jnp.abs(mass) < NO_SUM, 1.0, mass)
  return _weighted_sum(jnp.asarray(scale * factors), jnp.ones(size, bool), task_vectors)


@needs_frame("linear")
def linear(task_vectors: Params, weights: ArrayLike | None = None, *, normalize: bool = True) -> Params:
  """The weighted mean of T task vectors, or of T models.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    normalize: whether the sum is divided by that of the weights; negative ones count as such.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; summed in float32. Zeros give zeros, equal ones
    themselves, opposite ones cancel. Where one of the T is NaN the entry is NaN, also with weight 0. Traced weights
    that sum to 0 give infinities and NaNs where they are normalized, as in mergekit.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, `weights` is no vector of T finite numbers, or they are
      known to sum to 0 and shall be normalized.

  Reference: Wortsman et al. 2022, "Model soups", arXiv:2203.05482.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  if normalize:
    check_sum(factors)
    factors = factors / jnp.sum(factors)
  return _weighted_sum(factors, jnp.ones(size, bool), task_vectors)


@needs_frame("linear")
def passthrough(params: Params, scale: ArrayLike = 1.0) -> Params:
  """A model, or a task vector, times a scale: what stacking layers of several models is made of.

  Args:
    params: float leaves `[...]`.
    scale: scalar; may be traced.

  Returns:
    Structure, shapes and dtypes of `params`; multiplied in float32.

  Raises:
    ValueError: if `params` holds anything but floats, or `scale` is no finite scalar.

  Reference: mergekit's passthrough; no paper.
  """
  check_float_leaves(params, "params")
  check_setting("scale", scale)
  return jax.tree.map(lambda leaf: (scale * widen(leaf)).astype(leaf.dtype), as_arrays(params))


def _softmax(values: jax.Array, counted: jax.Array) -> jax.Array:
  """float32 softmax over the `counted` entries, 0 elsewhere; all 0 where none is counted."""
  best = jax.lax.stop_gradient(jnp.max(values, where=counted, initial=-jnp.inf))
  # What is masked out is replaced before the exponential too: the gradient must stay finite.
  powers = jnp.where(counted, jnp.exp(jnp.where(counted, values - best, 0.0)), 0.0)
  return powers / jnp.maximum(jnp.sum(powers), 1.0)  # the best has power 1, so the bound acts only on an empty sum


def _weighted_sum(weights: jax.Array, counted: jax.Array, task_vectors: Params) -> Params:
  """Sum over the leading axis in float32. What is not `counted` does not matter, in gradients neither."""

  def combine(leaf: jax.Array) -> jax.Array:
    # K terms written out fuse into one pass over the leaf; XLA's reduction over a leading axis is far slower on a CPU.
    terms = (weights[k] * jnp.where(counted[k], widen(leaf[k]), 0.0) for k in range(leaf.shape[0]))
    return functools.reduce(jnp.add, terms).astype(leaf.dtype)

  return jax.tree.map(combine, task_vectors)
