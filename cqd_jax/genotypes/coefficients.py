"""An individual as merge coefficients: how much of each expert's task vector, in each group of weights.

The genotype is one float32 array `[K, G]`: K experts, G groups. It merges without moving a parameter, so any emitter
or evolution strategy on real vectors searches it, and a gradient of a loss reaches it through `apply_coefficients`.
The whole of a model is one group (task arithmetic with a scale for each expert), or each layer's attention and
feed-forward (layer-wise AdaMerging: Yang et al. 2024, arXiv:2310.02575), or each kernel.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.checks import check_float_leaves, check_population
from cqd_jax.trees import Path, as_arrays, check_layers, is_matrix, is_stacked, map_with_path, stack_path
from cqd_jax.types import Params

GRANULARITIES = ("model", "layer", "kernel")

REST = "rest"


@dataclasses.dataclass(frozen=True)
class Groups:
  """Which group of coefficients each leaf of a params tree belongs to. Hashable: a static argument or a closure.

  Attributes:
    names: the groups' names, in the order of the coefficients' second axis.
    indices: for each leaf in the order of `jax.tree.leaves`, its group; for a stacked leaf whose layers belong to
      different groups, a tuple of one group a layer.
    structure: the params' tree structure.
  """

  names: tuple[str, ...]
  indices: tuple[int | tuple[int, ...], ...]
  structure: Any

  @property
  def size(self) -> int:
    """Number of groups G."""
    return len(self.names)


def group_leaves(params: Params, granularity: str = "model") -> Groups:
  """Divides the leaves of a model into groups that share their merge coefficients.

  Args:
    params: the model or a task vector of it, float leaves `[...]`.
    granularity: "model": one group. "layer": the matrices of each module of each layer (attention, feed-forward: the
      name that follows the layer's) are a group; all the rest (matrices outside of layers, vectors) is one more.
      "kernel": each matrix of each layer is a group; all vectors are one more. Layers and matrices are told as in
      `cqd_jax.trees`: layers by the leading axis of stacked leaves, or by a name that ends in a number.

  Returns:
    The groups, in the order of first use by the leaves; the rest is last.

  Raises:
    ValueError: if `params` holds anything but floats or `granularity` is unknown; where layers matter, also if some can
      be no stack (`cqd_jax.trees.check_layers`).
  """
  check_float_leaves(params, "params")
  if granularity not in GRANULARITIES:
    raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
  if granularity != "model":
    check_layers(params, "params")
  name = {"model": _name_of_model, "layer": _name_of_module, "kernel": _name_of_kernel}[granularity]
  labels: list[str | list[str]] = []

  def of_leaf(path: Path, leaf: jax.Array) -> None:
    label = name(path, leaf)
    divided = is_stacked(path) and label not in ("model", REST)
    labels.append([f"{label}[{layer}]" for layer in range(leaf.shape[0])] if divided else label)

  map_with_path(of_leaf, params)
  flat = [label for entry in labels for label in ([entry] if isinstance(entry, str) else entry)]
  names = sorted(dict.fromkeys(flat), key=lambda label: label == REST)
  index = {label: position for position, label in enumerate(names)}
  indices = tuple(
    index[entry] if isinstance(entry, str) else tuple(index[label] for label in entry) for entry in labels
  )
  return Groups(tuple(names), indices, jax.tree.structure(params))


def apply_coefficients(coefficients: jax.Array | np.ndarray, expert_task_vectors: Params, groups: Groups) -> Params:
  """The task vector of an individual: for each group the experts' task vectors, weighted and summed.

  Args:
    coefficients: `[K, G]` of one individual, float32; a population comes from `jax.vmap` over it only.
    expert_task_vectors: float leaves `[K, ...]`.
    groups: `group_leaves` of one expert's task vector.

  Returns:
    Leaves `[...]` in the dtypes of `expert_task_vectors`, summed in float32. Linear in both arguments, and
    differentiable with respect to both.

  Raises:
    ValueError: if the shapes do not fit each other, or `groups` is of another tree.
  """
  check_float_leaves(expert_task_vectors, "expert_task_vectors")
  coefficients, expert_task_vectors = as_arrays((coefficients, expert_task_vectors))
  structure: Any = jax.tree.structure(expert_task_vectors)
  if structure != groups.structure:
    raise ValueError("groups: expected `group_leaves` of a tree with the structure of expert_task_vectors")
  num_experts = check_population(expert_task_vectors, "expert_task_vectors")
  if num_experts == 0:
    raise ValueError("expert_task_vectors: expected at least one expert on the leading axis, got 0")
  if coefficients.shape != (num_experts, groups.size):
    raise ValueError(
      f"coefficients: expected [experts, groups] = {(num_experts, groups.size)}, got shape {coefficients.shape}"
    )

  def combine(leaf: jax.Array, group: int | tuple[int, ...]) -> jax.Array:
    if isinstance(group, tuple) and leaf.shape[1:2] != (len(group),):
      raise ValueError(f"groups: made for {len(group)} layers, but a stacked leaf has shape {leaf.shape}")
    index = np.asarray(group)
    weights = coefficients.astype(jnp.float32)[:, index]
    weights = weights.reshape((num_experts, *index.shape) + (1,) * (leaf.ndim - 1 - index.ndim))
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    # K terms written out fuse into one pass; XLA's reduction over a leading axis is far slower on a CPU.
    terms = (weights[k] * leaf[k].astype(wide) for k in range(num_experts))
    return functools.reduce(jnp.add, terms).astype(leaf.dtype)

  leaves = jax.tree.leaves(expert_task_vectors)
  combined = [combine(leaf, group) for leaf, group in zip(leaves, groups.indices, strict=True)]
  return jax.tree.unflatten(structure, combined)


def _name_of_model(path: Path, leaf: jax.Array) -> str:
  return "model"


def _name_of_kernel(path: Path, leaf: jax.Array) -> str:
  return "/".join(path) if is_matrix(path, leaf) else REST


def _name_of_module(path: Path, leaf: jax.Array) -> str:
  """The path up to the first module inside of the layer (not to the leaf itself)."""
  if not is_matrix(path, leaf):
    return REST
  layer = len(stack_path(path))
  if not layer:
    numbered = [depth for depth, name in enumerate(path, start=1) if re.search(r"\d$", name)]
    if not numbered:
      return REST
    layer = numbered[0]
  return "/".join(path[: layer + 1]) if layer + 1 < len(path) else "/".join(path[:layer])
