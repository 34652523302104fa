"""What the operators share: the checks of their settings, and how they go through a tree, tensor by tensor.

A tensor is a leaf, or a layer of a stacked leaf (`cqd_jax.trees`): what a checkpoint keeps under one name.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cqd_jax.checks import check_float_leaves, check_population, check_same_tree
from cqd_jax.trees import Path, as_arrays, is_stacked, map_with_path, widen
from cqd_jax.types import Params

Convention: TypeAlias = Literal["paper", "mergekit"]
"""Whose way of doing it: that of the paper, or that of mergekit 0.1.5 where it is another."""

Granularity: TypeAlias = Literal["kernel", "model"]
"""What is taken together: each tensor, or all that an individual has."""


def check_setting(name: str, value: ArrayLike, *, low: float = -math.inf) -> None:
  """Raises unless `value` is a finite scalar of at least `low`. Of a traced one only the shape is checked."""
  if np.shape(value) != ():
    raise ValueError(f"{name}: expected a scalar, got shape {np.shape(value)}")
  if isinstance(value, jax.core.Tracer):
    return
  number = np.asarray(value).item()
  if not (math.isfinite(number) and number >= low):
    least = "" if low == -math.inf else f" of at least {low}"
    raise ValueError(f"{name}: expected a finite number{least}, got {number}")


def check_parents(first: Params, second: Params) -> tuple[Params, Params]:
  """Two task vectors with JAX arrays for leaves; raises unless they are floats of the same structure and shapes."""
  check_float_leaves(first, "first")
  first, second = as_arrays((first, second))
  check_same_tree(first, second, "first", "second")
  return first, second


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises unless a word is one of those that there are."""
  if value not in choices:
    raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_rows_axis(axis: int) -> None:
  """Raises unless it is an axis along which the rows of a tensor may lie."""
  if axis not in (-1, 0):
    raise ValueError(f"axis: expected -1 or 0, got {axis}")


def check_task_vectors(task_vectors: Params, number: int | None = None) -> tuple[Params, int]:
  """T task vectors with JAX arrays for leaves `[T, ...]`, and T.

  Raises:
    ValueError: unless all leaves are floats with a common leading axis that is not empty, of `number` where that is
      given.
  """
  check_float_leaves(task_vectors, "task_vectors")
  size = check_population(task_vectors, "task_vectors")
  if size == 0:
    raise ValueError("task_vectors: expected at least one individual on the leading axis, got 0")
  if number is not None and size != number:
    raise ValueError(f"task_vectors: expected {number} on the leading axis, got {size}")
  return as_arrays(task_vectors), size


def check_weights(weights: ArrayLike | None, size: int) -> jax.Array:
  """The weights as float32 `[T]`, None as ones; raises unless they are that many, and finite as far as is known."""
  if weights is None:
    return jnp.ones(size, jnp.float32)
  if np.shape(weights) != (size,):
    raise ValueError(f"weights: expected one weight per task vector, shape {(size,)}, got shape {np.shape(weights)}")
  if not isinstance(weights, jax.core.Tracer) and not np.isfinite(np.asarray(weights, np.float64)).all():
    raise ValueError(f"weights: expected finite numbers, got {np.asarray(weights)}")
  return jnp.asarray(weights, jnp.float32)


def check_sum(weights: jax.Array) -> None:
  """Raises if weights are known to sum to 0, which is no mean."""
  if not isinstance(weights, jax.core.Tracer) and float(np.asarray(weights).sum()) == 0.0:
    raise ValueError(f"weights: expected a sum other than 0 to divide by, got {weights}")


def map_tensors(function: Callable[..., jax.Array], tree: Params, *rest: Params, lead: Sequence[int] = (1,)) -> Params:
  """`jax.tree.map` over tensors: of a stacked leaf the function gets one layer at a time, by `jax.vmap`.

  Args:
    function: of a tensor of each tree, to a tensor without further axes in front.
    tree: leaves `[...]`, or `[T, ...]`.
    *rest: more trees of the same structure.
    lead: how many axes each tree has in front of those of one individual; the last one stands for all further trees.

  Returns:
    What the function gave; a stack has its layers in front.
  """
  given = [*lead, *[lead[-1]] * (1 + len(rest) - len(lead))]

  def of_leaf(path: Path, *leaves: jax.Array) -> jax.Array:
    if is_stacked(path) and leaves[0].ndim > given[0]:
      return jax.vmap(function, in_axes=tuple(given))(*leaves)
    return function(*leaves)

  return map_with_path(of_leaf, tree, *rest)


def weighted_sum(weights: jax.Array | Sequence[jax.Array], tensors: Sequence[jax.Array] | jax.Array) -> jax.Array:
  """Sum of T tensors times their weights, in float32; written out, so that it fuses into one pass over them."""
  terms = [weights[t] * widen(tensors[t]) for t in range(len(tensors))]
  return functools.reduce(jnp.add, terms)


def total(terms: Sequence[Any]) -> Any:
  """The sum of a few arrays, in one pass; XLA's own reduction over a leading axis is far slower on a CPU."""
  return functools.reduce(jnp.add, terms)
