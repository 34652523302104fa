"""Task vectors: the difference that fine-tuning made, taken from a model and put back.

Reference: Ilharco et al. 2023, "Editing Models with Task Arithmetic", arXiv:2212.04089.
"""

import jax
from jax.typing import ArrayLike

from cqd_jax.checks import check_float_leaves, check_same_tree
from cqd_jax.operators.arithmetic import check_setting
from cqd_jax.trees import as_arrays, widen
from cqd_jax.types import Params


def task_vector(params: Params, base: Params) -> Params:
  """The task vector `params - base`.

  Args:
    params: float leaves `[...]` of a fine-tuned model.
    base: the model it was tuned from; same structure, shapes and dtypes.

  Returns:
    The differences, taken in float32 and rounded to the leaves' dtype.

  Raises:
    ValueError: if the trees differ, or hold anything but floats.
  """
  check_float_leaves(base, "base")
  base, params = as_arrays((base, params))
  check_same_tree(base, params, "base", "params")

  def subtract(tuned: jax.Array, origin: jax.Array) -> jax.Array:
    return (widen(tuned) - widen(origin)).astype(origin.dtype)

  return jax.tree.map(subtract, params, base)


def apply_task_vector(base: Params, task_vector: Params, scale: ArrayLike = 1.0) -> Params:
  """The model `base + scale * task_vector`.

  Args:
    base: float leaves `[...]` of the base model.
    task_vector: same structure, shapes and dtypes.
    scale: scalar; may be traced.

  Returns:
    The params, computed in float32 and rounded to the leaves' dtype once.

  Raises:
    ValueError: if the trees differ or hold anything but floats, or `scale` is no finite scalar.
  """
  check_float_leaves(base, "base")
  base, task_vector = as_arrays((base, task_vector))
  check_same_tree(base, task_vector, "base", "task_vector")
  check_setting("scale", scale)

  def add(origin: jax.Array, difference: jax.Array) -> jax.Array:
    return (widen(origin) + scale * widen(difference)).astype(origin.dtype)

  return jax.tree.map(add, base, task_vector)
