"""What the operators share: the checks of their settings and of their parents."""

import math

import jax
import numpy as np
from jax.typing import ArrayLike

from cqd_jax.checks import check_float_leaves, check_same_tree
from cqd_jax.trees import as_arrays
from cqd_jax.types import Params


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
