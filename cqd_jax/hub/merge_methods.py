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

from cqd_jax.operators import (
  arcee_fusion,
  consensus_merge,
  iso_c,
  karcher,
  linear,
  magmax,
  model_stock,
  model_stock_rows,
  multislerp,
  nearswap,
  nuslerp,
  nuslerp_rows,
  passthrough,
  ram,
  ramplus_tl,
  sce,
  sign_consensus,
  slerp,
  task_arithmetic,
  tsv,
)
from cqd_jax.operators.sparsify import check_window, drop_tensor, pruned_by, restored, tails_of, trim_tensor

REQUIRED = object()
"""The default of a setting that has none."""

Base: TypeAlias = Literal["needed", "welcome", "input"]
"""What a base model is to a method: it stands apart from the others, it does so if there is one, or is one of them."""

Settings: TypeAlias = Mapping[str, Any]

Merge: TypeAlias = Callable[[jax.Array, Any, jax.Array, Settings], jax.Array]
"""Of a key, the base's tensor or None, the other models' `[T, ...]`, and the settings by name; all float32."""

Sparsify: TypeAlias = Callable[[jax.Array, jax.Array, Any, Settings], jax.Array]
"""Of a key, a task vector, the density of its model, and the settings."""


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A setting of a method.

  Attributes:
    kind: of its values.
    default: its value where a recipe says nothing, or `REQUIRED`.
    per_model: whether each model has its own.
    low, high: the range of a number, ends included.
    traced: whether its value may always change without compiling again; else, only where a recipe has a gradient.
    note: why it has no effect; empty: it has one.
  """

  kind: Literal["number", "integer", "bool"]
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
    least, most: how many models it takes beside a base that stands apart. None: any number.
    parameters: its settings by name.
    check: raises a `ValueError` for settings of a tensor that do not go together.
  """

  merge: Merge
  base: Base
  least: int
  most: int | None
  parameters: Mapping[str, Parameter]
  check: Callable[[Settings], None] = lambda settings: None


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


def _linear(key: jax.Array, base: Any, tensors: jax.Array, settings: Settings) -> jax.Array:
  del key, base
  merged: jax.Array = linear(tensors, settings["weight"], normalize=settings["normalize"])
  return merged


def _passthrough(key: jax.Array, base: Any, tensors: jax.Array, settings: Settings) -> jax.Array:
  del key, base
  merged: jax.Array = passthrough(tensors[0], settings["scale"][0])
  return merged


def _karcher(key: jax.Array, base: Any, tensors: jax.Array, settings: Settings) -> jax.Array:
  del key, base
  merged: jax.Array = karcher(tensors, max_iter=int(settings["max_iter"]), tol=settings["tol"])
  return merged


def _slerp(key: jax.Array, base: Any, tensors: jax.Array, settings: Settings) -> jax.Array:
  del key
  merged: jax.Array = slerp(base, tensors[0], settings["t"], granularity="kernel", convention="mergekit")
  return merged


def _task_vectors(merge: Callable[[jax.Array, Settings], Any]) -> Merge:
  """The base plus a merge of task vectors; without a base, a merge of the tensors."""

  def around(key: jax.Array, base: Any, tensors: jax.Array, settings: Settings) -> jax.Array:
    del key
    merged: jax.Array = merge(tensors, settings) if base is None else base + merge(tensors - base[None], settings)
    return merged

  return around


def _nuslerp(tensors: jax.Array, settings: Settings) -> Any:
  if settings["nuslerp_flatten"]:
    return nuslerp(tensors, settings["weight"], convention="mergekit")
  # By rows it goes along columns, as mergekit does.
  return nuslerp_rows(
    tensors, settings["weight"], axis=0 if settings["nuslerp_row_wise"] else -1, convention="mergekit"
  )


def _multislerp(tensors: jax.Array, settings: Settings) -> Any:
  normalized = settings["normalize_weights"]
  return multislerp(tensors, settings["weight"], normalize_weights=normalized, eps=settings["eps"])


def _model_stock(tensors: jax.Array, settings: Settings) -> Any:
  return (model_stock_rows if settings["filter_wise"] else model_stock)(tensors, convention="mergekit")


def _sce(tensors: jax.Array, settings: Settings) -> Any:
  share = settings["select_topk"]
  return sce(tensors, select_topk=share, convention="mergekit") if share > 0 else jnp.zeros_like(tensors[0])


def _ramplus(tensors: jax.Array, settings: Settings) -> Any:
  return ramplus_tl(tensors, r=settings["r"], alpha=settings["alpha"], epsilon=settings["epsilon"])


def _arcee_fusion(key: jax.Array, base: Any, tensors: jax.Array, settings: Settings) -> jax.Array:
  del key, settings
  merged: jax.Array = base + arcee_fusion(tensors[0] - base, base)
  return merged


def _keep_all(key: jax.Array, task_vector: jax.Array, density: Any, settings: Settings) -> jax.Array:
  del key, density, settings
  return task_vector


def _keep_largest(key: jax.Array, task_vector: jax.Array, density: Any, settings: Settings) -> jax.Array:
  del key, settings
  return jnp.where(jnp.asarray(density) > 0, trim_tensor(task_vector, density), 0.0)


def _keep_middle(key: jax.Array, task_vector: jax.Array, density: Any, settings: Settings) -> jax.Array:
  del key
  return tails_of(density, settings["gamma"], "mergekit")(task_vector)


def _keep_random(key: jax.Array, task_vector: jax.Array, density: Any, settings: Settings) -> jax.Array:
  del settings
  return drop_tensor(key, task_vector, density, rescale=False)


def _keep_by_rank(key: jax.Array, task_vector: jax.Array, density: Any, settings: Settings) -> jax.Array:
  pruned = pruned_by(density, settings["epsilon"], -1, "mergekit", rescale=False)(key, task_vector)
  return jnp.where(jnp.asarray(density) >= 1, task_vector, pruned)


def _sparse(sparsify: Sparsify, consensus: bool) -> Merge:
  """base + lambda times the task vectors' sum: each sparsified and weighted, and where their signs agree, or all."""

  def merge(key: jax.Array, base: Any, tensors: jax.Array, settings: Settings) -> jax.Array:
    task_vectors = tensors - base[None]
    densities = settings.get("density", (1.0,) * len(tensors))
    parts = []
    for number in range(len(tensors)):
      own, subkey = task_vectors[number], jax.random.fold_in(key, number)
      part = sparsify(subkey, own, densities[number], settings)
      parts.append(restored(part, own) if settings.get("rescale") else part)
    how = {"weights": settings["weight"], "normalize": settings["normalize"]}
    together: Any = jnp.stack(parts)
    merged = sign_consensus(together, **how, convention="mergekit") if consensus else task_arithmetic(together, **how)
    changed: jax.Array = base + settings["lambda"] * merged
    return changed

  return merge


def _switch(default: bool, note: str = "") -> Parameter:
  return Parameter("bool", default, traced=False, note=note)


def _number(
  default: Any = REQUIRED, low: float = -math.inf, high: float = math.inf, *, traced: bool = True
) -> Parameter:
  return Parameter("number", default, low=low, high=high, traced=traced)


WEIGHT = Parameter("number", per_model=True)
MASK = _switch(False, "masks take no memory of their own here")
DENSITY = Parameter("number", 1.0, per_model=True, low=0.0, high=1.0, traced=False)
NOT_SPARSE = "nothing is sparsified"


def _sparse_method(
  sparsify: Sparsify,
  consensus: bool,
  *,
  normalize: bool,
  rescale: bool,
  check: Callable[[Settings], None] = lambda settings: None,
  more: Mapping[str, Parameter] = {},
) -> Method:
  """A method of sparsified task vectors, with the settings that all of them have."""
  shared = {"normalize": _switch(normalize), "rescale": _switch(rescale), "lambda": _number(1.0), "int8_mask": MASK}
  return Method(
    _sparse(sparsify, consensus), "needed", 0, None, {"weight": WEIGHT, "density": DENSITY, **shared, **more}, check
  )


def _task_arithmetic() -> Method:
  method = _sparse_method(_keep_all, False, normalize=False, rescale=False)
  idle = {"density": dataclasses.replace(DENSITY, note=NOT_SPARSE), "rescale": _switch(False, NOT_SPARSE)}
  return dataclasses.replace(method, parameters={**method.parameters, **idle})


def _check_windows(settings: Settings) -> None:
  """Raises unless all probabilities of DELLA are some."""
  for density in settings["density"]:
    check_window(density, settings["epsilon"], "mergekit")


def _weighted(merge: Callable[..., Any], least: int = 1, **more: Parameter) -> Method:
  """A method that mergekit has not: of task vectors with weights, times lambda."""

  def merged(tensors: jax.Array, settings: Settings) -> Any:
    own = {name: int(settings[name]) if kind.kind == "integer" else settings[name] for name, kind in more.items()}
    return settings["lambda"] * merge(tensors, settings["weight"], **own)

  weight = dataclasses.replace(WEIGHT, default=1.0)
  return Method(_task_vectors(merged), "needed", least, None, {"weight": weight, "lambda": _number(1.0), **more})


_EPSILON = _number(1e-5, 0.0)
_WINDOW = {"epsilon": _number(0.15, 0.0, 1.0, traced=False)}
_TAILS = {"gamma": _number(0.01, 0.0, 0.999, traced=False)}

METHODS: Mapping[str, Method] = {
  "linear": Method(_linear, "input", 1, None, {"weight": WEIGHT, "normalize": _switch(True)}),
  "slerp": Method(_slerp, "needed", 1, 1, {"t": _number()}),
  "nuslerp": Method(
    _task_vectors(_nuslerp),
    "welcome",
    2,
    2,
    {"weight": WEIGHT, "nuslerp_flatten": _switch(True), "nuslerp_row_wise": _switch(False)},
  ),
  "multislerp": Method(
    _task_vectors(_multislerp),
    "welcome",
    1,
    None,
    {"weight": WEIGHT, "normalize_weights": _switch(True), "eps": _number(1e-8, 0.0)},
  ),
  "karcher": Method(
    _karcher,
    "input",
    1,
    None,
    {"max_iter": Parameter("integer", 10, low=1.0, high=1000.0, traced=False), "tol": _number(1e-5, 0.0)},
  ),
  "passthrough": Method(_passthrough, "input", 1, 1, {"scale": Parameter("number", 1.0, per_model=True)}),
  "model_stock": Method(_task_vectors(_model_stock), "needed", 2, None, {"filter_wise": _switch(False)}),
  "arcee_fusion": Method(_arcee_fusion, "needed", 1, 1, {}),
  "task_arithmetic": _task_arithmetic(),
  "ties": _sparse_method(_keep_largest, True, normalize=True, rescale=False),
  "dare_linear": _sparse_method(_keep_random, False, normalize=False, rescale=True),
  "dare_ties": _sparse_method(_keep_random, True, normalize=False, rescale=True),
  "breadcrumbs": _sparse_method(_keep_middle, False, normalize=False, rescale=False, more=_TAILS),
  "breadcrumbs_ties": _sparse_method(_keep_middle, True, normalize=False, rescale=False, more=_TAILS),
  "della": _sparse_method(_keep_by_rank, True, normalize=True, rescale=True, check=_check_windows, more=_WINDOW),
  "della_linear": _sparse_method(
    _keep_by_rank, False, normalize=False, rescale=True, check=_check_windows, more=_WINDOW
  ),
  "nearswap": Method(
    _task_vectors(lambda tensors, settings: nearswap(tensors[0], t=settings["t"])), "needed", 1, 1, {"t": _number()}
  ),
  "sce": Method(
    _task_vectors(_sce),
    "needed",
    0,
    None,
    {"select_topk": _number(1.0, 0.0, 1.0, traced=False), "int8_mask": MASK},
  ),
  "ram": Method(
    _task_vectors(lambda tensors, settings: ram(tensors, epsilon=settings["epsilon"])),
    "needed",
    0,
    None,
    {"epsilon": _EPSILON},
  ),
  "ramplus_tl": Method(
    _task_vectors(_ramplus),
    "needed",
    0,
    None,
    {"r": _number(0.1, 0.0), "alpha": _number(0.2, 0.0), "epsilon": _EPSILON},
  ),
  "magmax": _weighted(magmax),
  "consensus_merge": _weighted(
    consensus_merge,
    2,
    threshold=_number(0.4, 0.0),
    agree=Parameter("integer", 2, low=1.0, high=1000.0, traced=False),
  ),
  "tsv": _weighted(tsv),
  "iso_c": _weighted(iso_c),
}
"""mergekit's by its names, and behind them those that it has not."""
