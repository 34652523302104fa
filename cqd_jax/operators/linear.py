"""The random weighted sum of two task vectors."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cqd_jax.checks import check_key
from cqd_jax.operators.arithmetic import check_parents, check_setting
from cqd_jax.operators.frames import needs_frame
from cqd_jax.trees import Path, check_layers, is_stacked, layer_name, map_with_path, stack_path, widen
from cqd_jax.types import Params, PRNGKey

GRANULARITIES = ("model", "layer", "kernel")

CANCELLATION = 0.01
"""Two weights cancel where |w1 + w2| is at most this part of |w1| + |w2|."""


@needs_frame("linear")
def linear_merge(
  key: PRNGKey,
  first: Params,
  second: Params,
  *,
  std: ArrayLike,
  mean: ArrayLike = 1.0,
  granularity: str = "model",
  normalize: bool = True,
  with_weights: bool = False,
) -> Params | tuple[Params, jax.Array]:
  """Merges two parents with random weights: `w1' first + w2' second`.

  w1 and w2 are drawn independently from N(mean, std^2) and normalized by `merge_weights` unless stated otherwise.
  Weights may be negative.

  Args:
    key: typed PRNG key; consumed.
    first: float leaves `[...]` of one parent's task vector; no population axis.
    second: the other parent's; same structure, shapes and dtypes.
    std: standard deviation of the weights, at least 0; may be traced. With 0 the child is the plain mean.
    mean: mean of the weights; may be traced.
    granularity: what shares a pair of weights. "model": everything (the paper). "layer": each layer, where the
      stacked leaves under one `layers` have a layer at every index of their leading axis, and other leaves belong to
      `cqd_jax.trees.layer_name`. "kernel": each leaf, and each layer of each stacked leaf.
    normalize: whether the pair is scaled to sum to 1; False uses the weights as drawn, which can leave the line
      through the parents.
    with_weights: whether the weights that were drawn are returned too.

  Returns:
    The child's task vector: structure, shapes and dtypes of `first`; computed in float32. With `with_weights` a pair:
    the child, and the weights of both parents in each of G groups, float32 `[2, G]`.

  Raises:
    ValueError: if the trees differ, hold anything but floats, or a setting is out of range; where layers matter, also
      if some can be no stack (`cqd_jax.trees.check_layers`).

  Reference: Kuroki et al. 2025, arXiv:2410.14735, section 3.3, which has mean 1, std 0.01, one pair a model. "layer",
  "kernel" and `normalize=False` are additions.
  """
  check_key(key)
  first, second = check_parents(first, second)
  check_setting("std", std, low=0.0)
  check_setting("mean", mean)
  if granularity not in GRANULARITIES:
    raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
  if granularity != "model":
    check_layers(first, "first")

  groups, num_groups = _weight_groups(first, granularity)
  weights = draw_weights(key, num_groups, mean=mean, std=std, normalize=normalize)

  def merge(group: np.ndarray, one: jax.Array, other: jax.Array) -> jax.Array:
    axes = group.shape + (1,) * (one.ndim - group.ndim)
    ours, theirs = (weight[group].reshape(axes) for weight in (weights[0], weights[1]))
    return (ours * widen(one) + theirs * widen(other)).astype(one.dtype)

  child = jax.tree.map(merge, groups, first, second)
  return (child, weights) if with_weights else child


def draw_weights(
  key: PRNGKey, num_groups: int = 1, *, std: ArrayLike, mean: ArrayLike = 1.0, normalize: bool = True
) -> jax.Array:
  """Two independent weights from N(mean, std^2) for each group, made to sum to 1 by `merge_weights` unless told not to.

  Returns:
    The weights of both parents, float32 `[2, num_groups]`.
  """
  drawn = jnp.asarray(mean + std * jax.random.normal(key, (2, num_groups), jnp.float32))
  return jnp.stack(merge_weights(drawn[0], drawn[1])) if normalize else drawn


def merge_weights(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scales pairs of weights to sum to 1: w1 / (w1 + w2) and w2 / (w1 + w2).

  Where |w1 + w2| <= `CANCELLATION` (|w1| + |w2|) the quotient says nothing but noise, and the pair is defined as
  (1/2, 1/2). So all finite weights give finite ones, of at most 50.5 in absolute value.

  Args:
    first: `[...]` weights of the first parent.
    second: `[...]` weights of the second; same shape and dtype.

  Returns:
    The two normalized weights, `[...]` each.
  """
  total = first + second
  cancels = jnp.abs(total) <= CANCELLATION * (jnp.abs(first) + jnp.abs(second))
  divisor = jnp.where(cancels, 1.0, total)  # before the division, whose gradient must stay finite too
  return jnp.where(cancels, 0.5, first / divisor), jnp.where(cancels, 0.5, second / divisor)


def _weight_groups(tree: Params, granularity: str) -> tuple[Params, int]:
  """The group of weights of each leaf, and the number of groups.

  Returns:
    In the structure of `tree`, an int array: `[]`, or `[L]` for a leaf whose layers belong to different groups.
  """
  groups: dict[str, int] = {}

  def number(name: str) -> int:
    return groups.setdefault(name, len(groups))

  def of_leaf(path: Path, leaf: jax.Array) -> np.ndarray:
    if granularity == "model":
      return np.asarray(number("model"))
    if not is_stacked(path) or leaf.ndim == 0:
      return np.asarray(number(layer_name(path) if granularity == "layer" else "/".join(path)))
    stack = "/".join(stack_path(path)) if granularity == "layer" else "/".join(path)
    return np.asarray([number(f"{stack}[{layer}]") for layer in range(leaf.shape[0])])

  indices = map_with_path(of_leaf, tree)
  return indices, len(groups)
