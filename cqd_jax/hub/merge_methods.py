"""The merge methods that a recipe can name: their settings, and the operator that each is.

A method is a row of `METHODS`: a further operator is a further row. Settings have mergekit's names and defaults, and
where a paper and mergekit differ a recipe means mergekit's form, since it is written in mergekit's words.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from cqd_jax.operators import dare, sign_consensus, slerp, task_arithmetic, trim

REQUIRED = object()
"""The default of a setting that has none."""

Base: TypeAlias = Literal["origin", "end", "input"]
"""What the base model is: the origin of task vectors, the end at t = 0, or one more input, without which it goes."""

Merge: TypeAlias = Callable[[jax.Array, Any, jax.Array, Mapping[str, Any]], jax.Array]
"""Of a key, the base's tensor or None, the other models' `[T, ...]`, and the settings by name; all float32."""


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A setting of a method.

  Attributes:
    kind: "number" or "bool".
    default: its value where a recipe says nothing, or `REQUIRED`.
    per_model: whether each model has its own.
    low, high: the range of a number, ends included.
    traced: whether its value may change without compiling again.
    note: why it has no effect; empty: it has one.
  """

  kind: Literal["number", "bool"]
  default: Any = REQUIRED
  per_model: bool = False
  low: float = -math.inf
  high: float = math.inf
  traced: bool = True
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Method:
  """A merge method.

  Attributes:
    merge: the operator.
    base: what `base_model` is to it.
    least, most: how many models it takes beside a base that is origin or end; else in all. None: any number.
    parameters: its settings by name.
  """

  merge: Merge
  base: Base
  least: int
  most: int | None
  parameters: Mapping[str, Parameter]


@functools.partial(jax.jit, static_argnames=("method", "fixed"))
def merge_tensors(
  key: Any, base: Any, tensors: Any, traced: Mapping[str, Any], *, method: str, fixed: tuple[tuple[str, Any], ...]
) -> Any:
  """One tensor of all models becomes one.

  Args:
    key: for methods that draw; each tensor has its own.
    base: `[...]` float32, or None where the method has no base.
    tensors: `[T, ...]` float32: the other models'.
    traced: the settings that are traced; `[T]` if each model has its own.
    method: a name of `METHODS`.
    fixed: the other settings, with their names.

  Returns:
    `[...]` float32.
  """
  return METHODS[method].merge(key, base, tensors, {**traced, **dict(fixed)})


def _scaled(tensors: jax.Array, factors: Any) -> jax.Array:
  factors = jnp.asarray(factors, jnp.float32)
  return tensors * factors.reshape(factors.shape + (1,) * (tensors.ndim - 1))


def _sum(tensors: jax.Array) -> jax.Array:
  total: jax.Array = task_arithmetic(tensors, 1.0)
  return total


def _linear(key: jax.Array, base: Any, tensors: jax.Array, settings: Mapping[str, Any]) -> jax.Array:
  del key, base
  weights = settings["weight"]
  return _sum(_scaled(tensors, weights / jnp.sum(weights) if settings["normalize"] else weights))


def _passthrough(key: jax.Array, base: Any, tensors: jax.Array, settings: Mapping[str, Any]) -> jax.Array:
  del key, base
  return _scaled(tensors, settings["scale"])[0]


def _slerp(key: jax.Array, base: Any, tensors: jax.Array, settings: Mapping[str, Any]) -> jax.Array:
  del key
  merged: jax.Array = slerp(base, tensors[0], settings["t"])
  return merged


def _keep_all(key: jax.Array, task_vector: jax.Array, density: float) -> jax.Array:
  del key, density
  return task_vector


def _keep_largest(key: jax.Array, task_vector: jax.Array, density: float) -> jax.Array:
  del key
  return jnp.zeros_like(task_vector) if density <= 0 else trim(task_vector, density=density)


def _keep_random(key: jax.Array, task_vector: jax.Array, density: float) -> jax.Array:
  if density <= 0:
    return jnp.zeros_like(task_vector)
  kept: jax.Array = dare(key, task_vector, drop_rate=1.0 - density)
  return kept * density  # as it was: what is lost is made up for as the recipe says


def _restored(sparse: jax.Array, task_vector: jax.Array) -> jax.Array:
  """Scaled to the sum of magnitudes that the task vector had, where neither is nothing."""
  before, after = jnp.sum(jnp.abs(task_vector)), jnp.sum(jnp.abs(sparse))
  some = (before >= 1e-7) & (after >= 1e-7)
  return sparse * jnp.where(some, before / jnp.where(some, after, 1.0), 1.0)


def _around_base(sparsify: Callable[..., jax.Array], consensus: bool) -> Merge:
  """base + lambda times the task vectors' sum: each sparsified and weighted, and where their signs agree, or all."""

  def merge(key: jax.Array, base: Any, tensors: jax.Array, settings: Mapping[str, Any]) -> jax.Array:
    task_vectors = tensors - base[None]
    weights, densities = settings["weight"], settings.get("density") or (1.0,) * len(tensors)
    parts = []
    for number, density in enumerate(densities):
      part = sparsify(jax.random.fold_in(key, number), task_vectors[number], density)
      parts.append(_restored(part, task_vectors[number]) if settings.get("rescale") else part)
    sparse = jnp.stack(parts)
    if consensus:
      merged: Any = sign_consensus(sparse, weights, normalize=settings["normalize"], convention="mergekit")
    else:
      mass = jnp.sum(weights)
      divisor = jnp.where(settings["normalize"] & (jnp.abs(mass) >= 1e-8), mass, 1.0)
      merged = _sum(_scaled(sparse, weights / divisor))
    changed: jax.Array = base + settings["lambda"] * merged
    return changed

  return merge


def _task_vectors(
  sparsify: Callable[..., jax.Array], consensus: bool, *, normalize: bool, rescale: bool | None = None
) -> Method:
  """A method of sparsified task vectors; without `rescale` nothing is sparsified."""
  density = Parameter("number", 1.0, per_model=True, low=0.0, high=1.0, traced=False)
  switch = functools.partial(Parameter, "bool", traced=False)
  if rescale is None:
    none = "nothing is sparsified"
    density, rescaled = dataclasses.replace(density, note=none), switch(False, note=none)
  else:
    rescaled = switch(rescale)
  return Method(
    _around_base(sparsify, consensus),
    "origin",
    0,
    None,
    {
      "weight": Parameter("number", per_model=True),
      "density": density,
      "normalize": switch(normalize),
      "rescale": rescaled,
      "lambda": Parameter("number", 1.0),
      "int8_mask": switch(False, note="masks take no memory of their own here"),
    },
  )


METHODS: Mapping[str, Method] = {
  "linear": Method(
    _linear,
    "input",
    1,
    None,
    {"weight": Parameter("number", per_model=True), "normalize": Parameter("bool", True, traced=False)},
  ),
  "slerp": Method(_slerp, "end", 1, 1, {"t": Parameter("number")}),
  "passthrough": Method(_passthrough, "input", 1, 1, {"scale": Parameter("number", 1.0, per_model=True)}),
  "task_arithmetic": _task_vectors(_keep_all, False, normalize=False),
  "ties": _task_vectors(_keep_largest, True, normalize=True, rescale=False),
  "dare_linear": _task_vectors(_keep_random, False, normalize=False, rescale=True),
  "dare_ties": _task_vectors(_keep_random, True, normalize=False, rescale=True),
}
"""By mergekit's names."""

KNOWN = (
  *METHODS,
  "nuslerp",
  "multislerp",
  "karcher",
  "model_stock",
  "arcee_fusion",
  "breadcrumbs",
  "breadcrumbs_ties",
  "della",
  "della_linear",
  "nearswap",
  "sce",
  "ram",
  "ramplus_tl",
)
"""Names of mergekit; those that are not in `METHODS` are refused by name."""
