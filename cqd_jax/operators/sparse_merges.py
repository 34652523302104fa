"""Sparsified task vectors merged: as a plain weighted sum, or where their signs agree.

mergekit's names. Each is a way of `cqd_jax.operators.sparsify` with one of two ways to merge, and all have the same
settings: `normalize` divides by the weights, `rescale` makes up for what was zeroed. The lambda of the papers is the
`scale` of `apply_task_vector`.
"""

from collections.abc import Callable, Sequence
from typing import get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.checks import check_key
from cqd_jax.operators.aggregation import NO_SUM
from cqd_jax.operators.arithmetic import (
  Convention,
  check_choice,
  check_task_vectors,
  check_weights,
  map_tensors,
  total,
  weighted_sum,
)
from cqd_jax.operators.consensus import agree
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.sparsify import (
  check_density,
  check_share,
  check_window,
  drop_tensor,
  pruned_by,
  restored,
  tails_of,
  tensor_keys,
)
from cqd_jax.types import Params, PRNGKey

Sparsify = Callable[[jax.Array, jax.Array], jax.Array]
"""Of a key and a tensor; what it gives is float32, or the tensor's dtype."""


@needs_frame("elementwise")
def breadcrumbs(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike = 0.9,
  gamma: ArrayLike = 0.01,
  normalize: bool = False,
  rescale: bool = False,
  convention: Convention = "paper",
) -> Params:
  """The weighted sum of task vectors without their largest and smallest entries (`trim_tails` of each).

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    density: the share of entries of each tensor that is kept, in (0, 1]; may be traced.
    gamma: the share of largest entries that goes, in [0, 1); may be traced.
    normalize: whether the sum is divided by that of the weights, where that is not 0.
    rescale: whether each tensor that is left is scaled to the sum of magnitudes that it had.
    convention: as for `trim_tails`.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Zeros merge as zeros, opposite
    ones cancel, equal ones give their own trimmed times the weights. A NaN counts among the largest entries, so that it
    goes with the outliers or makes its entry NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or a setting is out of range.

  Reference: Davari and Belilovsky 2023, arXiv:2312.06795.
  """
  sparsify = _without_tails(density, gamma, convention)
  return _merge(sparsify, None, task_vectors, weights, False, normalize, rescale, convention)


@needs_frame("elementwise")
def breadcrumbs_ties(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike = 0.9,
  gamma: ArrayLike = 0.01,
  normalize: bool = False,
  rescale: bool = False,
  convention: Convention = "paper",
) -> Params:
  """`sign_consensus` of task vectors without their largest and smallest entries (`trim_tails` of each).

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    density: the share of entries of each tensor that is kept, in (0, 1]; may be traced.
    gamma: the share of largest entries that goes, in [0, 1); may be traced.
    normalize: whether the weighted mean of what agrees is taken; False: the weighted sum.
    rescale: whether each tensor that is left is scaled to the sum of magnitudes that it had.
    convention: as for `trim_tails` and `sign_consensus`.

  Returns:
    As `breadcrumbs`.

  Raises:
    ValueError: as `breadcrumbs`.

  Reference: mergekit's breadcrumbs_ties; no paper has both.
  """
  sparsify = _without_tails(density, gamma, convention)
  return _merge(sparsify, None, task_vectors, weights, True, normalize, rescale, convention)


def _without_tails(density: ArrayLike, gamma: ArrayLike, convention: Convention) -> Sparsify:
  """`trim_tails` of one tensor; its settings are checked."""
  check_density(density)
  check_share("gamma", gamma)
  trimmed = tails_of(density, gamma, convention)
  return lambda _, tensor: trimmed(tensor)


@needs_frame("elementwise")
def dare_linear(
  key: PRNGKey,
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike = 0.5,
  normalize: bool = False,
  rescale: bool = True,
  convention: Convention = "paper",
) -> Params:
  """The weighted sum of task vectors of which random entries are zeroed.

  Args:
    key: typed PRNG key; consumed. Each tensor of each task vector draws on its own.
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    density: the probability with which an entry is kept, in (0, 1]; may be traced.
    normalize: whether the sum is divided by that of the weights, where that is not 0.
    rescale: whether what is kept makes up for what is not.
    convention: how it does. "paper": divided by `density`, so that the expectation is that of the weighted sum.
      "mergekit": scaled to the sum of magnitudes that the tensor had.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Zeros merge as zeros; equal
    and opposite ones keep different entries, so they do not merge to themselves or cancel. What is zeroed leaves no
    trace, NaN neither ("mergekit": a NaN makes its tensor NaN).

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or a setting is out of range.

  Reference: Yu et al. 2024, arXiv:2311.03099.
  """
  check_key(key)
  check_density(density)
  drop = _dropped(density, rescale and convention == "paper")
  restore = rescale and convention == "mergekit"
  return _merge(drop, key, task_vectors, weights, False, normalize, restore, convention)


@needs_frame("elementwise")
def dare_ties(
  key: PRNGKey,
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike = 0.5,
  normalize: bool = False,
  rescale: bool = True,
  convention: Convention = "paper",
) -> Params:
  """`sign_consensus` of task vectors of which random entries are zeroed.

  Args:
    key: typed PRNG key; consumed. Each tensor of each task vector draws on its own.
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    density: the probability with which an entry is kept, in (0, 1]; may be traced.
    normalize: whether the weighted mean of what agrees is taken; False: the weighted sum.
    rescale: whether what is kept makes up for what is not.
    convention: as for `dare_linear` and `sign_consensus`.

  Returns:
    As `dare_linear`.

  Raises:
    ValueError: as `dare_linear`.

  Reference: Yu et al. 2024, arXiv:2311.03099, with Yadav et al. 2023, arXiv:2306.01708. Not normalized, as in mergekit.
  """
  check_key(key)
  check_density(density)
  drop = _dropped(density, rescale and convention == "paper")
  restore = rescale and convention == "mergekit"
  return _merge(drop, key, task_vectors, weights, True, normalize, restore, convention)


@needs_frame("elementwise")
def della(
  key: PRNGKey,
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike = 0.5,
  epsilon: ArrayLike = 0.15,
  axis: int = -1,
  normalize: bool = True,
  rescale: bool = True,
  convention: Convention = "paper",
) -> Params:
  """`sign_consensus` of task vectors of which random entries are zeroed, small ones rather than large (`magprune`).

  Args:
    key: typed PRNG key; consumed. Each tensor of each task vector draws on its own.
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    density: the probability with which an entry in the middle of its row is kept; may be traced.
    epsilon: how much the probabilities differ; may be traced. See `magprune`.
    axis: along which entries are ranked; static. See `magprune`.
    normalize: whether the weighted mean of what agrees is taken; False: the weighted sum.
    rescale: whether what is kept makes up for what is not.
    convention: as for `magprune` and `sign_consensus`.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Zeros merge as zeros. What is
    zeroed leaves no trace, NaN neither ("mergekit": a NaN makes its tensor NaN).

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or a setting is out of range.

  Reference: Deep et al. 2024, arXiv:2406.11617.
  """
  check_key(key)
  check_window(density, epsilon, convention)
  prune = pruned_by(density, epsilon, axis, convention, rescale=rescale)
  restore = rescale and convention == "mergekit"
  return _merge(prune, key, task_vectors, weights, True, normalize, restore, convention)


@needs_frame("elementwise")
def della_linear(
  key: PRNGKey,
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike = 0.5,
  epsilon: ArrayLike = 0.15,
  axis: int = -1,
  normalize: bool = False,
  rescale: bool = True,
  convention: Convention = "paper",
) -> Params:
  """The weighted sum of task vectors of which random entries are zeroed, small ones rather than large (`magprune`).

  In the "paper" convention its expectation is that of the weighted sum.

  Args:
    key: typed PRNG key; consumed. Each tensor of each task vector draws on its own.
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    density: the probability with which an entry in the middle of its row is kept; may be traced.
    epsilon: how much the probabilities differ; may be traced. See `magprune`.
    axis: along which entries are ranked; static. See `magprune`.
    normalize: whether the sum is divided by that of the weights, where that is not 0.
    rescale: whether what is kept makes up for what is not.
    convention: as for `magprune`.

  Returns:
    As `della`.

  Raises:
    ValueError: as `della`.

  Reference: Deep et al. 2024, arXiv:2406.11617, without the election of signs.
  """
  check_key(key)
  check_window(density, epsilon, convention)
  prune = pruned_by(density, epsilon, axis, convention, rescale=rescale)
  restore = rescale and convention == "mergekit"
  return _merge(prune, key, task_vectors, weights, False, normalize, restore, convention)


def _dropped(density: ArrayLike, rescale: bool) -> Sparsify:
  return lambda key, tensor: drop_tensor(key, tensor, density, rescale=rescale)


def _merge(
  sparsify: Sparsify,
  key: PRNGKey | None,
  task_vectors: Params,
  weights: ArrayLike | None,
  elect: bool,
  normalize: bool,
  restore: bool,
  convention: Convention,
) -> Params:
  """Sparsifies each tensor of each task vector, restores its sum of magnitudes, and merges."""
  task_vectors, size = check_task_vectors(task_vectors)
  weights = check_weights(weights, size)
  check_choice("convention", convention, get_args(Convention))

  def merge(tensors: jax.Array, subkey: jax.Array) -> jax.Array:
    keys = jax.random.split(subkey, size)
    sparse = [sparsify(keys[t], tensors[t]) for t in range(size)]
    if restore:
      sparse = [restored(each, tensors[t]) for t, each in enumerate(sparse)]
    combine = agree if elect else _sum
    return combine(sparse, weights, normalize=normalize, convention=convention).astype(tensors.dtype)

  one = jax.tree.map(lambda leaf: leaf[0], task_vectors)
  keys = tensor_keys(jax.random.key(0) if key is None else key, one)
  return map_tensors(merge, task_vectors, keys, lead=(1, 0))


def _sum(tensors: Sequence[jax.Array], weights: jax.Array, *, normalize: bool, convention: Convention) -> jax.Array:
  """The weighted sum, over that of the weights where that is wanted and not 0; alike in both conventions."""
  del convention
  mass = total(list(weights)) if normalize else jnp.ones(())
  return weighted_sum(weights, tensors) / jnp.where(jnp.abs(mass) < NO_SUM, 1.0, mass)
