"""Where the arrays of a swarm live on a mesh of devices: weights over a `model` axis, children over `population`.

The programs stay what they are; `jax.jit` parts them by where their arguments are. The base and its bases are sharded,
genotypes are small and every device has those that it needs:

    mesh = make_mesh(population=2, model=4)
    basis = place_basis(basis, mesh)
    repertoire, emitter_state = place_replicated((repertoire, emitter_state), mesh)
    ask = jax.jit(cycleqd.ask, out_shardings=(over_population(mesh), None))
    tell = jax.jit(cycleqd.tell, out_shardings=replicated(mesh), donate_argnames=("repertoire", "emitter_state"))

No program of ask or tell has the base among its arguments. On several hosts every process runs the same lines, after
`jax.distributed.initialize`.

(To try it on a CPU, give XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false":
without the second, products and collectives of virtual devices can wait for one another for ever on few cores.)
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cqd_jax.genotypes.core import CoreBasis
from cqd_jax.trees import Path, is_matrix, map_with_path
from cqd_jax.types import Params

POPULATION, MODEL = "population", "model"

ROW_PARALLEL = ("embed", "output", "down")
"""Modules whose matrices are cut along their rows: those that read what a column-parallel one has written, so that
activations need not be gathered in between (Shoeybi et al. 2019, arXiv:1909.08053); and the embedding, by token."""


def make_mesh(*, population: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of `population` x `model` devices.

  Args:
    population: into how many parts a batch of children is divided.
    model: into how many parts the base's weights are divided. Neighbouring devices hold one model together.
    devices: which; None: all there are, on all hosts.

  Raises:
    ValueError: unless the axes' product is the number of devices.
  """
  chosen = list(jax.devices() if devices is None else devices)
  if population < 1 or model < 1 or population * model != len(chosen):
    raise ValueError(
      f"population, model: expected a product of {len(chosen)}, the number of devices, got {population} x {model}"
    )
  axes = (AxisType.Auto, AxisType.Auto)
  return Mesh(np.array(chosen).reshape(population, model), (POPULATION, MODEL), axis_types=axes)


def replicated(mesh: Mesh) -> NamedSharding:
  """On every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_population(mesh: Mesh) -> NamedSharding:
  """The leading axis divided over the mesh's `population` axis; it must be a multiple of that."""
  return NamedSharding(mesh, PartitionSpec(POPULATION))


def place_replicated(tree: Any, mesh: Mesh) -> Any:
  """A tree of arrays, typed PRNG keys included, on every device. All processes must give the same arrays."""
  return jax.tree.map(lambda leaf: _put(leaf, replicated(mesh)), tree)


def place_basis(basis: CoreBasis, mesh: Mesh, *, row_parallel: Collection[str] = ROW_PARALLEL) -> CoreBasis:
  """A basis with its matrices divided over the mesh's `model` axis and everything small on every device.

  All processes must give the same basis.
  """
  return jax.tree.map(_put, basis, basis_shardings(basis, mesh, row_parallel=row_parallel))


def basis_shardings(basis: CoreBasis, mesh: Mesh, *, row_parallel: Collection[str] = ROW_PARALLEL) -> CoreBasis:
  """The sharding of each array of a basis, in its structure (of shapes too, before anything is loaded).

  The base is cut as `param_shardings` cuts it. The basis that belongs to the cut axis of a matrix is cut with it, the
  other is on every device; so are both where a convolution is cut along its input channels, no blocks of rows.
  """

  def of_basis(own_axis: int, tree: Params) -> Params:
    """Rows of `left` (`right`) are the rows (columns) of the matrix; they are the last axis but one in both."""

    def sharding(path: Path, leaf: Any, part: Any) -> NamedSharding | None:
      cut = _cut(path, leaf, mesh, row_parallel)
      if part is None:
        return None
      follows = cut == own_axis and part.shape[-2] == leaf.shape[own_axis]
      return _along(part, -2 if follows else None, mesh)

    return map_with_path(sharding, basis.base, tree)

  return basis.replace(
    base=param_shardings(basis.base, mesh, row_parallel=row_parallel),
    left=of_basis(-2, basis.left),
    right=of_basis(-1, basis.right),
    experts=jax.tree.map(lambda _: replicated(mesh), basis.experts),
    errors=jax.tree.map(lambda _: replicated(mesh), basis.errors),
  )


def param_shardings(params: Params, mesh: Mesh, *, row_parallel: Collection[str] = ROW_PARALLEL) -> Params:
  """The sharding of each leaf of a model (arrays or shapes) over the mesh's `model` axis.

  A matrix [m, n] is cut along its columns, or along its rows where a name in its path is in `row_parallel`; along the
  other axis where its size is no multiple of the mesh's, or not at all. Of a convolution [kh, kw, in, out] these are
  output and input channels. Vectors are on every device.
  """
  return map_with_path(lambda path, leaf: _along(leaf, _cut(path, leaf, mesh, row_parallel), mesh), params)


def _cut(path: Path, leaf: Any, mesh: Mesh, row_parallel: Collection[str]) -> int | None:
  """The axis along which a matrix is cut, from the end: -2 or -1."""
  if not is_matrix(path, leaf):
    return None
  order = (-2, -1) if set(path) & set(row_parallel) else (-1, -2)
  return next((axis for axis in order if leaf.shape[axis] % mesh.shape[MODEL] == 0), None)


def _along(leaf: Any, axis: int | None, mesh: Mesh) -> NamedSharding:
  spec: list[str | None] = [None] * leaf.ndim
  if axis is not None:
    spec[axis] = MODEL
  return NamedSharding(mesh, PartitionSpec(*spec))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
  """`jax.device_put`; where devices are of other processes too, each puts its own share of the array that all have."""
  if sharding.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  leaf = jnp.asarray(leaf)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
  if not leaf.is_fully_addressable:
    moved: jax.Array = jax.jit(lambda array: array, out_shardings=sharding)(leaf)
    return moved
  host = np.asarray(leaf)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
