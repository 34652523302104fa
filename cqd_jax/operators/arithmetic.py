"""What the operators share: the check of their settings."""

import math

import jax
import numpy as np
from jax.typing import ArrayLike


def check_setting(name: str, value: ArrayLike, *, low: float = -math.inf) -> None:
  """Raises unless `value` is a finite scalar of at least `low`. Of a traced one the shape alone is checked."""
  if np.shape(value) != ():
    raise ValueError(f"{name}: expected a scalar, got shape {np.shape(value)}")
  if isinstance(value, jax.core.Tracer):
    return
  number = np.asarray(value).item()
  if not (math.isfinite(number) and number >= low):
    least = "" if low == -math.inf else f" of at least {low}"
    raise ValueError(f"{name}: expected a finite number{least}, got {number}")
