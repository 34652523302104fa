"""Merges that solve for something: for the nearest point to the center, the least interference, or what data say.

What data say is given as statistics of each expert: squared gradients (Fisher), or inner products of inputs (RegMean).
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.checks import check_same_tree
from cqd_jax.operators.arithmetic import (
  Convention,
  Granularity,
  check_choice,
  check_rows_axis,
  check_setting,
  check_task_vectors,
  check_weights,
  total,
)
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.in_turn import InTurn, exact, merge_matrices
from cqd_jax.operators.inner_products import combine, lengths_of
from cqd_jax.trees import as_arrays, widen
from cqd_jax.types import Params

LEAST_PRODUCT = 1e-6
"""Two lengths multiply to at least this in mergekit's Model Stock, so that small ones are at a larger angle."""


@needs_frame("inner_product")
def model_stock(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  granularity: Granularity = "kernel",
  convention: Convention = "paper",
) -> Params:
  """The mean of task vectors, drawn to the base as far as they disagree.

  With c the mean cosine between two of them it is their mean times `T c / (1 + (T - 1) c)`: the point nearest to the
  center of all models that fine-tuning might have given.

  Args:
    task_vectors: float leaves `[T, ...]`, T at least 2.
    weights: `[T]` of the mean; may be traced. None: all 1, the paper.
    granularity: what has an angle: each tensor (the paper's layers), or the whole model.
    convention: "mergekit": two lengths multiply to at least 1e-6.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Equal ones give themselves.
    Zeros are at a right angle to all; those and opposite ones give zero, and a negative mean cosine a negative factor,
    as in mergekit. Where 1 + (T - 1) c is 0 to 1e-6 the result is 0. A NaN makes its tensor NaN.

  Raises:
    ValueError: if there are fewer than two, or `weights` is no vector of T finite numbers.

  Reference: Jang et al. 2024, arXiv:2403.19522, which has one angle; the mean over pairs is that of mergekit.
  """
  return _model_stock(task_vectors, weights, None, granularity, convention)


@needs_frame("elementwise")
def model_stock_rows(
  task_vectors: Params, weights: ArrayLike | None = None, *, axis: int = -1, convention: Convention = "paper"
) -> Params:
  """`model_stock` with an angle for each vector along an axis of each tensor: mergekit's `filter_wise`.

  Args:
    task_vectors: float leaves `[T, ...]`, T at least 2.
    weights: as for `model_stock`.
    axis: of a tensor, along which a vector lies: -1, or 0. A tensor of one axis is one vector. mergekit has -1, of
      matrices [out, in]; the kernels of Flax are their transposes.
    convention: as for `model_stock`.

  Returns:
    As `model_stock`.

  Raises:
    ValueError: as `model_stock`, or if `axis` is another.
  """
  check_rows_axis(axis)
  return _model_stock(task_vectors, weights, axis, "kernel", convention)


def _model_stock(
  task_vectors: Params,
  weights: ArrayLike | None,
  axis: int | None,
  granularity: Granularity,
  convention: Convention,
) -> Params:
  task_vectors, size = check_task_vectors(task_vectors)
  if size < 2:
    raise ValueError(f"task_vectors: expected at least 2 on the leading axis, got {size}")
  shares = check_weights(weights, size)
  shares = shares / jnp.sum(shares)
  check_choice("granularity", granularity, get_args(Granularity))
  check_choice("convention", convention, get_args(Convention))

  def toward_base(gram: jax.Array) -> jax.Array:
    lengths, pairs = lengths_of(gram), []
    for i in range(size):
      for j in range(i + 1, size):
        product = lengths[i] * lengths[j]
        if convention == "mergekit":
          product = jnp.maximum(product, LEAST_PRODUCT)
        pairs.append(jnp.where(product == 0, 0.0, gram[i, j] / jnp.where(product == 0, 1.0, product)))
    cosine = total([jnp.clip(pair, -1.0, 1.0) for pair in pairs]) / len(pairs)
    divisor = 1.0 + (size - 1) * cosine
    none = jnp.abs(divisor) < 1e-6
    factor = jnp.where(none, 0.0, size * cosine / jnp.where(none, 1.0, divisor))
    return jnp.stack([shares[t] * factor for t in range(size)])

  return combine(task_vectors, toward_base, granularity, axis=axis)


@needs_frame("inner_product")
def wudi(task_vectors: Params, weights: ArrayLike | None = None, *, ridge: ArrayLike = 1e-3) -> Params:
  """The task vector that interferes least with each of T on the inputs that these respond to.

  A task vector spans the inputs that it was trained on. So of each matrix that X is sought which least disturbs them,
  `sum_t w_t |x_t^T (X - x_t)|^2 / |x_t|^2` (kernels [in, out]), near the weighted sum S of all: `ridge |X - S|^2` is
  added. It is solved for exactly; the authors take 300 steps of Adam from S.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, at least 0; may be traced. None: all 1, the paper.
    ridge: above 0; may be traced. The eigenvalues of the quadratic form sum to T, whatever the task vectors' size. The
      result is exact to about 1e-7 / ridge of it.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32, vectors by their mean. Zeros
    are left out; equal ones give themselves, up to the ridge; opposite ones zero; one gives itself. A NaN makes its
    matrix NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, layers can be no stack, or a setting is out of range.

  Reference: Cheng et al. 2025, arXiv:2503.08099.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  check_setting("ridge", ridge, low=0.0)
  turn = InTurn()

  def merge(matrices: jax.Array) -> jax.Array:
    squares = jnp.sum(matrices**2, axis=(-2, -1), keepdims=True)
    shares = jnp.where(squares == 0, 0.0, 1.0 / jnp.where(squares == 0, 1.0, squares))
    forms = [factors[t] * shares[t] * exact(matrices[t], matrices[t].mT) for t in range(size)]
    middle = total([factors[t] * matrices[t] for t in range(size)])
    pull = total([exact(form, matrices[t] - middle) for t, form in enumerate(forms)])
    form = total(forms)
    form = form + jnp.broadcast_to(ridge * jnp.eye(matrices.shape[-2]), form.shape)
    return middle + turn.solve(form, pull)

  return merge_matrices(merge, task_vectors, factors)


@needs_frame("elementwise")
def fisher(
  task_vectors: Params, fishers: Params, weights: ArrayLike | None = None, *, floor: ArrayLike = 1e-6
) -> Params:
  """The mean of task vectors in which each entry weighs as the data of its task depend on it.

  `sum_t w_t F_t x_t / sum_t w_t F_t`, entry by entry; of task vectors it is the same as of models.

  Args:
    task_vectors: float leaves `[T, ...]`.
    fishers: the diagonals of the Fisher information of each expert: mean squares of the gradients of log-likelihoods.
      Leaves at least 0, structure and shapes of `task_vectors`.
    weights: `[T]`; may be traced. None: all 1.
    floor: what an entry of `fishers` is at least; may be traced. With 0, where all are 0 the result is 0.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Equal ones give themselves,
    one too. A NaN makes its entry NaN.

  Raises:
    ValueError: if the trees differ, the leaves' leading axes are empty, or a setting is out of range.

  Reference: Matena and Raffel 2021, arXiv:2111.09832.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  check_setting("floor", floor, low=0.0)
  fishers = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), as_arrays(fishers))
  wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), task_vectors)
  check_same_tree(wide, fishers, "task_vectors", "fishers")

  def merge(tensors: jax.Array, information: jax.Array) -> jax.Array:
    shares = [factors[t] * jnp.maximum(information[t], floor) for t in range(size)]
    divisor = total(shares)
    merged = total([share * widen(tensors[t]) for t, share in enumerate(shares)])
    return (merged / jnp.where(divisor == 0, 1.0, divisor)).astype(tensors.dtype)

  return jax.tree.map(merge, task_vectors, fishers)


@needs_frame("elementwise")
def regmean(task_vectors: Params, grams: Params, weights: ArrayLike | None = None, *, alpha: ArrayLike = 0.9) -> Params:
  """The matrices whose outputs are nearest to those of all experts, each on its own data.

  It solves `(sum_t w_t G_t) X = sum_t w_t G_t x_t` with `G_t` the inner products of the inputs of a matrix; of task
  vectors it is the same as of models. With the inputs of the merged model's earlier layers it is RegMean++.

  Args:
    task_vectors: float leaves `[T, ...]`.
    grams: for each leaf of matrices [m, n], `[T, ..., m, m]`: `inputs^T inputs` of each expert; None for vectors.
    weights: `[T]`; may be traced. None: all 1.
    alpha: what entries of the `grams` beside the diagonal are multiplied by, in [0, 1]; may be traced. At 1 they must
      not be singular. The paper has 0.9.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32, vectors by their mean. Equal
    ones give themselves, one too. An input that no data have is merged by the mean. A NaN makes its matrix NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, `grams` does not fit, or a setting is out of range.

  Reference: Jin et al. 2022, arXiv:2212.09849; RegMean++: Nguyen et al. 2025, arXiv:2508.03121.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  check_setting("alpha", alpha, low=0.0)
  structure: Any = jax.tree.structure(task_vectors)
  try:
    structure.flatten_up_to(grams)
  except (TypeError, ValueError) as error:
    raise ValueError(f"grams: expected the structure of task_vectors, got another tree ({error})") from error
  turn = InTurn()

  def merge(matrices: jax.Array, given: Any) -> jax.Array:
    expected = (*matrices.shape[:-1], matrices.shape[-2])
    if getattr(given, "shape", None) != expected:
      raise ValueError(f"grams: expected {expected} for matrices, got {getattr(given, 'shape', type(given).__name__)}")
    unit = jnp.broadcast_to(jnp.eye(expected[-1]), expected[1:])
    reduced = [factors[t] * widen(jnp.asarray(given[t])) * (alpha + (1 - alpha) * unit) for t in range(size)]
    whole = total(reduced)
    unseen = jnp.sum(whole * unit, axis=-1) == 0
    right = total([exact(each, matrices[t]) for t, each in enumerate(reduced)])
    mean = total([factors[t] * matrices[t] for t in range(size)]) / jnp.sum(factors)
    return turn.solve(whole + unseen[..., None] * unit, jnp.where(unseen[..., None], mean, right))

  return merge_matrices(merge, task_vectors, factors, grams)
