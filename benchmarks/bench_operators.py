"""Operators on a population of task vectors: how near to the machine's limits are crossover and mutation?"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import Case
from cqd_jax.operators import (
  aggregate,
  expert_svd_mutation,
  factorize,
  gaussian_mutation,
  linear_merge,
  svd_mutation,
)
from cqd_jax.trees import is_matrix, map_with_path, num_parameters
from cqd_jax.types import Params

STD = 0.01


def cases(quick: bool) -> list[Case]:
  """Crossover, both SVD mutations, Gaussian mutation and aggregation, in float32 and bfloat16."""
  # 50 million weights a population at full size, 200 MB in float32: beyond any cache. The SVD mutations get smaller
  # matrices: arithmetic bounds them.
  streamed = shapes(layers=2, width=32) if quick else shapes(layers=4, width=512)
  multiplied = shapes(layers=1, width=16) if quick else shapes(layers=2, width=256)
  decomposed = shapes(layers=1, width=16) if quick else shapes(layers=2, width=96)
  children = 2 if quick else 4
  result = []
  for dtype in ("float32", "bfloat16"):
    result += [
      merge_case(streamed, children, dtype, "model"),
      merge_case(streamed, children, dtype, "kernel"),
      aggregate_case(streamed, children, dtype),
      expert_svd_case(multiplied, children, dtype),
    ]
  return [
    *result,
    fresh_merge_case(streamed, children, "float32"),
    gaussian_case(streamed, children, "float32"),
    svd_case(decomposed, children, "float32"),
  ]


def shapes(layers: int, width: int) -> Params:
  """The shapes of a small decoder's task vector, its layers stacked."""
  kernel = (layers, width, width)
  return {
    "embedding": {"kernel": (8 * width, width)},
    "layers": {
      "attention": {"query": {"kernel": kernel}, "out": {"kernel": kernel}},
      "mlp": {"up": {"kernel": (layers, width, 4 * width)}, "down": {"kernel": (layers, 4 * width, width)}},
      "norm": {"scale": (layers, width)},
    },
  }


def population(sizes: Params, lead: tuple[int, ...], dtype: str, seed: int) -> Params:
  """Random task vectors of the given shapes, `lead` axes in front."""
  structure: Any = jax.tree.structure(sizes, is_leaf=_is_shape)
  keys = jax.random.split(jax.random.key(seed), structure.num_leaves)
  leaves = jax.tree.leaves(sizes, is_leaf=_is_shape)
  drawn = [jax.random.normal(key, (*lead, *shape), dtype) for key, shape in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(structure, drawn)


def merge_case(sizes: Params, children: int, dtype: str, granularity: str) -> Case:
  """Crossover into the first parents' buffers: two populations read, one written."""
  return Case(
    name=f"linear_merge, {granularity}",
    labels=_labels(sizes, children, dtype),
    function=jax.vmap(functools.partial(linear_merge, std=STD, granularity=granularity)),
    arguments=lambda: _parents(sizes, children, dtype),
    bytes_moved=3 * _num_bytes(sizes, children, dtype),
    recycle=1,
    peer=_each(functools.partial(linear_merge, std=STD, granularity=granularity)),
    peer_name="loop without jit",
  )


def fresh_merge_case(sizes: Params, children: int, dtype: str) -> Case:
  """The same into new buffers: on a CPU the price of their pages is added."""
  return Case(
    name="linear_merge, new buffers",
    labels=_labels(sizes, children, dtype),
    function=jax.vmap(functools.partial(linear_merge, std=STD)),
    arguments=lambda: _parents(sizes, children, dtype),
    bytes_moved=3 * _num_bytes(sizes, children, dtype),
    peer=_numpy_merge,
    peer_name="NumPy",
  )


def gaussian_case(sizes: Params, children: int, dtype: str) -> Case:
  """Gaussian mutation in place; bound by the random bits rather than by memory."""
  mutate = functools.partial(gaussian_mutation, std=STD)
  return Case(
    name="gaussian_mutation",
    labels=_labels(sizes, children, dtype),
    function=jax.vmap(mutate),
    arguments=lambda: (_keys(children), population(sizes, (children,), dtype, 0)),
    bytes_moved=2 * _num_bytes(sizes, children, dtype),
    recycle=1,
    peer=_each(mutate),
    peer_name="loop without jit",
  )


def aggregate_case(sizes: Params, children: int, dtype: str) -> Case:
  """All task vectors read, one written."""
  return Case(
    name="aggregate",
    labels=_labels(sizes, children, dtype),
    function=aggregate,
    arguments=lambda: (population(sizes, (children,), dtype, 0), jnp.linspace(0.0, 1.0, children)),
    bytes_moved=_num_bytes(sizes, children + 1, dtype),
    peer=lambda task_vectors, fitnesses: jax.tree.map(
      lambda leaf: jnp.tensordot(jax.nn.softmax(fitnesses).astype(leaf.dtype), leaf, axes=1), task_vectors
    ),
    peer_name="tensordot without jit",
  )


def expert_svd_case(sizes: Params, children: int, dtype: str) -> Case:
  """The reference code's mutation with factors computed before: one product (m, r) by (r, n) a matrix and child."""
  mutate = functools.partial(expert_svd_mutation, rate=0.1)

  def arguments() -> tuple[Any, ...]:
    expert_svd = jax.jit(factorize)(population(sizes, (), dtype, 1))
    return _keys(children), population(sizes, (children,), dtype, 0), expert_svd

  return Case(
    name="expert_svd_mutation",
    labels=_labels(sizes, children, dtype),
    function=jax.vmap(mutate, in_axes=(0, 0, None)),
    arguments=arguments,
    flops=children * _product_flops(sizes),
    recycle=1,
    peer=_each(mutate, shared=1),
    peer_name="loop without jit",
  )


def svd_case(sizes: Params, children: int, dtype: str) -> Case:
  """The paper's mutation: an SVD a matrix and child, whose cost has no honest FLOP count."""
  mutate = functools.partial(svd_mutation, max_scale=2.0)
  return Case(
    name="svd_mutation",
    labels=_labels(sizes, children, dtype),
    function=jax.vmap(mutate),
    arguments=lambda: (_keys(children), population(sizes, (children,), dtype, 0)),
    recycle=1,
    peer=_each(mutate),
    peer_name="loop without jit",
  )


def _each(operator: Callable[..., Params], shared: int = 0) -> Callable[..., Params]:
  """The unfused way: `operator` individual by individual without jit; the last `shared` arguments are for all."""

  def loop(*arguments: Any) -> Params:
    split = len(arguments) - shared
    individuals = [
      operator(*(jax.tree.map(lambda leaf: leaf[i], argument) for argument in arguments[:split]), *arguments[split:])  # noqa: B023
      for i in range(arguments[0].shape[0])
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *individuals)

  return loop


def _numpy_merge(keys: jax.Array, first: Params, second: Params) -> Params:
  def merge(one: jax.Array, other: jax.Array) -> Any:
    ours, theirs = jax.device_get((one, other))
    return (0.6 * ours + 0.4 * theirs).astype(one.dtype)

  return jax.tree.map(merge, first, second)


def _parents(sizes: Params, children: int, dtype: str) -> tuple[Any, ...]:
  first, second = (population(sizes, (children,), dtype, seed) for seed in (0, 1))
  return _keys(children), first, second


def _keys(children: int) -> jax.Array:
  return jax.random.split(jax.random.key(7), children)


def _labels(sizes: Params, children: int, dtype: str) -> dict[str, str | int | float]:
  return {"dtype": dtype, "children": children, "parameters": _num_parameters(sizes)}


def _num_parameters(sizes: Params) -> int:
  return sum(math.prod(shape) for shape in jax.tree.leaves(sizes, is_leaf=_is_shape))


def _num_bytes(sizes: Params, individuals: int, dtype: str) -> int:
  return individuals * _num_parameters(sizes) * jnp.dtype(dtype).itemsize


def _product_flops(sizes: Params) -> int:
  """FLOPs of U diag(s) V^T over all matrices of one individual: 2 m r n each."""
  structs = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), sizes, is_leaf=_is_shape)

  def count(path: tuple[str, ...], leaf: Any) -> int:
    return 2 * num_parameters(leaf) * min(leaf.shape[-2:]) if is_matrix(path, leaf) else 0

  return sum(jax.tree.leaves(map_with_path(count, structs)))


def _is_shape(node: Any) -> bool:
  return isinstance(node, tuple)
