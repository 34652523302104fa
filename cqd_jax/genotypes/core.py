"""Core space: individuals as small matrices in bases that all experts share.

For each kernel W (m, n) the task vectors of K experts are B_k A_k. With orthonormal bases U (m, a) of the columns of
all B_k, and V (n, b) of the rows of all A_k, each is U C_k V^T with a small core C_k (a, b). A weighted sum of task
vectors is the weighted sum of cores; the singular values of U C V^T are those of C, and its singular vectors are U and
V times those of C. So merging, mutation along singular vectors, and aggregation of cores give exactly the core of what
they give of task vectors: the operators of `cqd_jax.operators` serve both kinds.

Reference: Panariello et al. 2025, "Accurate and Efficient Low-Rank Model Merging in Core Space", arXiv:2509.17786.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.checks import check_float_leaves, check_key, check_population
from cqd_jax.genotypes.factors import METHODS, relative_error, truncate, truncate_by_energy
from cqd_jax.low_rank import LowRank, LowRankUpdate, sequence_after
from cqd_jax.trees import Path, as_arrays, as_matrices, check_layers, is_matrix, leaf_path, matrix_shape, widen
from cqd_jax.types import Genotype, Params, PRNGKey

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Fit(NamedTuple):
  """How well the core space holds an expert's task vector of one kernel (of a stack: of its worst layer).

  What rounding the bases to the base's dtype, and cores to theirs, costs is not counted.

  Attributes:
    path: of the kernel, as "layers/mlp/up/kernel".
    expert: its number.
    rank: of the factors.
    energy: the share of the squared Frobenius norm that is kept.
    relative_error: what is lost, over the norm of the task vector.
  """

  path: str
  expert: int
  rank: int
  energy: float
  relative_error: float


class CoreBasis(flax.struct.PyTreeNode):
  """A base model, bases of what its experts learnt, and the experts in them; made by `from_experts`.

  A genotype has the structure of the params: `[..., a, b]` cores in the place of matrices, and the difference to the
  base in that of vectors. (A convolution's kernel is a matrix with m = kh * kw * in, see `cqd_jax.trees`.) It is an
  ordinary individual of `cqd_jax.operators`, and only of this basis: keep the basis with what is kept of genotypes. A
  dense task vector becomes one by `encode`.

  Attributes:
    base: params of the base model.
    left: in the structure of `base`, `[..., m, a]` with orthonormal columns at matrices, None at vectors; dtypes of
      `base`.
    right: likewise `[..., n, b]`.
    experts: the experts' genotypes, leaves `[K, ...]`.
    errors: likewise at matrices, `[K, ...]` float32: the relative error of each matrix of each expert.
    ranks: of each leaf in order, the K ranks; None at vectors.
  """

  base: Params
  left: Params
  right: Params
  experts: Genotype
  errors: Params
  ranks: tuple[tuple[int, ...] | None, ...] = flax.struct.field(pytree_node=False)

  @classmethod
  def from_experts(
    cls,
    base: Params,
    task_vectors: Params | Sequence[Params],
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    method: str = "auto",
    dtype: jax.typing.DTypeLike = jnp.float32,
    key: PRNGKey | None = None,
  ) -> "CoreBasis":
    """The core space of K experts. On the host, one leaf at a time; of one leaf all matrices at once.

    Args:
      base: params of the base model, float leaves `[...]`; shared with the result, not copied.
      task_vectors: the experts' task vectors. Either stacked, leaves `[K, ...]`; or a list of K trees in the structure
        of `base`, whose matrices may also be `LowRank` factors [m, r] and [r, n] (ranks may differ) or None (the expert
        left that leaf as it is).
      rank: to which dense matrices are truncated; factors keep their own rank. One number, or a number for each matrix
        by its path ("layers/mlp/up/kernel"), with "*" for all that are not named. None: not truncated, or by `energy`.
      energy: the share of each matrix's squared Frobenius norm to keep, in (0, 1], instead of a rank.
      method: "exact": LAPACK's SVD. "randomized": nearly as good, for large matrices and small ranks by orders of
        magnitude faster. "auto": whichever suits the shape.
      dtype: of genotypes. Cores are small, and in bfloat16 they would drift over many variations.
      key: of the randomized way; None: a fixed one.

    Returns:
      The basis. `fits` reports how well it holds the experts.

    Raises:
      ValueError: naming the argument: no expert, a leaf whose structure or shape is not that of `base`, values that are
        not finite (or are not in `dtype`), both `rank` and `energy`, a rank below 1 or for a path that is no matrix,
        layers that can be no stack (`trees.check_layers`); an `energy` while tracing, since ranks become shapes.
    """
    check_float_leaves(base, "base")
    check_layers(base, "base")
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f"dtype: expected a float dtype, got {jnp.dtype(dtype)}")
    if key is not None:
      check_key(key)
    base = as_arrays(base)
    structure: Any = jax.tree.structure(base)
    named = [(leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(base)]
    shortest = {"/".join(path): min(matrix_shape(path, leaf)[-2:]) for path, leaf in named if is_matrix(path, leaf)}
    wanted = _check_ranks(rank, energy, method, shortest)
    rows: list[_Leaf] = []
    for (path, leaf), updates in zip(named, _by_leaf(task_vectors, structure), strict=True):
      name = "/".join(path)
      # One expert after the other: a dense update may be large, and need not be there before (see `_check_update`).
      given = (_check_update(update, path, leaf, f"task_vectors[{k}] at {name}") for k, update in enumerate(updates))
      if is_matrix(path, leaf):
        truncated = functools.partial(_truncate, rank=wanted[name], energy=energy, method=method, key=key)
        shape = matrix_shape(path, leaf)
        rows.append(_hold_matrix([_factor(update, shape, truncated) for update in given], leaf.dtype, dtype))
      else:
        zero = jnp.zeros_like(leaf, dtype)
        rows.append(_Leaf(jnp.stack([zero if update is None else update.astype(dtype) for update in given])))
      if not _is_finite(rows[-1].experts):
        raise ValueError(f"task_vectors at {name}: too large for the dtype {jnp.dtype(dtype)} of genotypes")
    experts, left, right, errors = (
      jax.tree.unflatten(structure, list(column)) for column in zip(*(row[:4] for row in rows), strict=True)
    )
    return cls(base, left, right, experts, errors, tuple(row.ranks for row in rows))

  @property
  def num_experts(self) -> int:
    """K."""
    return int(jax.tree.leaves(self.experts)[0].shape[0])

  def encode(self, task_vector: Params) -> Genotype:
    """The genotype of a dense task vector: exact in the space of the experts, the nearest one in it otherwise.

    Args:
      task_vector: float leaves `[...]` in the structure of the base; a population comes from `jax.vmap`.

    Raises:
      ValueError: if the structure or a shape is another.
    """
    leaves = self._flatten(task_vector, "task_vector")
    self._check_shapes(leaves, self.base, "task_vector")
    matrices = [
      leaf.reshape(*leaf.shape[: leaf.ndim - like.ndim], *matrix_shape(leaf_path(path), like))
      for leaf, (path, like) in zip(leaves, jax.tree.leaves_with_path(self.base), strict=True)
    ]

    def encode(leaf: jax.Array, left: jax.Array | None, right: jax.Array | None, like: jax.Array) -> jax.Array:
      if left is None or right is None:
        return leaf.astype(like.dtype)
      return _product(_product(widen(left).mT, widen(leaf)), widen(right)).astype(like.dtype)

    return self._map(encode, matrices, self.experts)

  def task_vector(self, genotype: Genotype) -> Params:
    """The dense task vector of an individual: leaves `[...]` in the dtypes of the base, computed in float32."""
    return self._map(_write_out, self._genotype(genotype), self.base)

  def materialize(self, genotype: Genotype) -> Params:
    """The params of an individual: base plus task vector, computed in float32, rounded to the base's dtypes once.

    One leaf after the other: beside the result nothing larger than a leaf is made.
    """
    leaves = [leaf for _, leaf in self.materialize_leaves(genotype)]
    return jax.tree.unflatten(jax.tree.structure(self.base), leaves)

  def materialize_leaves(self, genotype: Genotype) -> Iterator[tuple[Path, jax.Array]]:
    """The paths and leaves of `materialize` one by one, for a model that is written and not kept."""
    parts = zip(
      jax.tree.leaves_with_path(self.base),
      self._genotype(genotype),
      self._flatten(self.left, "left"),
      self._flatten(self.right, "right"),
      strict=True,
    )
    for (path, leaf), own, left, right in parts:
      yield leaf_path(path), _add(leaf, own, left, right)

  def apply(self, genotypes: Genotype) -> Params:
    """Params that share the base's matrices: a `LowRankUpdate` in the place of each, for `cqd_jax.models`.

    Args:
      genotypes: leaves `[...]` of one individual, or `[P, ...]` of a population.

    Returns:
      Params whose cores, and whose vectors, have the leading axis of `genotypes`; nothing of the size of a matrix is
      made. The `kernel` of a convolution's update is that of the base, in its own shape. Differentiable.
    """

    def join(own: jax.Array, left: jax.Array | None, right: jax.Array | None, leaf: jax.Array) -> Any:
      if left is None or right is None:
        wide = widen(leaf).reshape((1,) * (own.ndim - leaf.ndim) + leaf.shape)
        return (wide + own).astype(leaf.dtype)
      return LowRankUpdate(leaf, left, own, right)

    return self._map(join, self._genotype(genotypes), self.base)

  def fits(self) -> list[Fit]:
    """How well each expert's task vector is held, kernel by kernel; on the host."""
    rows = []
    errors = self._flatten(self.errors, "errors")
    for (path, _), error, ranks in zip(jax.tree.leaves_with_path(self.base), errors, self.ranks, strict=True):
      if ranks is None:
        continue
      worst = np.asarray(error, np.float64).reshape(self.num_experts, -1).max(axis=1)
      for expert, (rank, lost) in enumerate(zip(ranks, worst.tolist(), strict=True)):
        rows.append(Fit("/".join(leaf_path(path)), expert, rank, 1.0 - lost**2, lost))
    return rows

  def _map(self, function: Any, leaves: list[Any], rest: Params) -> Params:
    """`function(leaf, left, right, of rest)` over all leaves."""
    structure: Any = jax.tree.structure(self.base)
    columns = (structure.flatten_up_to(tree) for tree in (self.left, self.right, rest))
    return jax.tree.unflatten(structure, [function(*each) for each in zip(leaves, *columns, strict=True)])

  def _genotype(self, genotype: Genotype) -> list[Any]:
    """The leaves of one individual, or of a population; raises unless they are of this basis, as far as shapes show."""
    leaves = self._flatten(genotype, "genotype")
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.experts)
    self._check_shapes(leaves, like, "genotype")
    return leaves

  def _check_shapes(self, leaves: list[Any], like: Params, name: str) -> None:
    """Raises unless each leaf has the shape of that of `like`, or that behind a population axis."""
    expected = self._flatten(like, name)
    for (path, _), leaf, own in zip(jax.tree.leaves_with_path(self.base), leaves, expected, strict=True):
      shape = np.shape(leaf)
      if shape[len(shape) - own.ndim :] != own.shape or not own.ndim <= len(shape) <= own.ndim + 1:
        advice = " (`encode` makes a genotype of a dense task vector)" if name == "genotype" else ""
        raise ValueError(f"{name} at {'/'.join(leaf_path(path))}: expected shape {own.shape}, got {shape}{advice}")

  def _flatten(self, tree: Params, name: str) -> list[Any]:
    return _flatten(tree, jax.tree.structure(self.base), name)


class _Leaf(NamedTuple):
  """What the basis holds of one leaf."""

  experts: jax.Array
  left: jax.Array | None = None
  right: jax.Array | None = None
  errors: jax.Array | None = None
  ranks: tuple[int, ...] | None = None


def _hold_matrix(factored: Sequence[tuple[LowRank, jax.Array]], base_dtype: Any, dtype: Any) -> _Leaf:
  """Bases and cores of a leaf of matrices, from the experts' factors of it and what these have lost."""
  left, right, cores = _bases(tuple(factors for factors, _ in factored), base_dtype)
  cores = jax.block_until_ready(cores).astype(dtype)  # no two leaves' decompositions at once; see `sequence_after`
  errors = jnp.stack([error for _, error in factored])
  return _Leaf(cores, left, right, errors, tuple(factors.a.shape[-2] for factors, _ in factored))


def _is_finite(array: jax.Array) -> bool:
  """Whether an array is finite, or traced."""
  return isinstance(array, jax.core.Tracer) or bool(_all_finite(array))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
  return jnp.isfinite(array).all()


def _write_out(core: jax.Array, left: jax.Array | None, right: jax.Array | None, like: jax.Array) -> jax.Array:
  """The dense update of one leaf, float32 inside, in the dtype of `like` and, behind a population axis, its shape."""
  if left is None or right is None:
    return core.astype(like.dtype)
  dense = _product(_product(widen(left), widen(core)), widen(right).mT)
  return dense.reshape(*dense.shape[: dense.ndim - left.ndim], *like.shape).astype(like.dtype)


@jax.jit
def _add(leaf: jax.Array, own: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
  wide = widen(leaf)
  return (wide + _write_out(own, left, right, wide)).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _bases(factors: tuple[LowRank, ...], dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Orthonormal bases `[..., m, a]`, `[..., n, b]` of K factors, and the K cores `[K, ..., a, b]` in them.

  Householder's way gives orthonormal columns whatever the rank of what it is given; columns beyond the rank are of no
  use, and have zeros in all cores.
  """
  columns, rows = (
    jnp.concatenate([widen(part) for part in parts], axis=-1)
    for parts in ([one.b for one in factors], [one.a.mT for one in factors])
  )
  if not columns.shape[-1]:  # nobody changed these matrices; a basis of one vector spares all others empty arrays
    columns, rows = (jnp.zeros((*part.shape[:-1], 1)) for part in (columns, rows))
  left, left_part = jnp.linalg.qr(columns)
  right, right_part = jnp.linalg.qr(sequence_after(rows, left))
  ends = np.cumsum([one.a.shape[-2] for one in factors])[:-1]
  parts = zip(jnp.split(left_part, ends, axis=-1), jnp.split(right_part, ends, axis=-1), strict=True)
  cores = jnp.stack([_product(one, other.mT) for one, other in parts])
  return left.astype(dtype), right.astype(dtype), cores


def _truncate(
  matrix: jax.Array, *, rank: int | None, energy: float | None, method: str, key: PRNGKey | None
) -> LowRank:
  if energy is not None:
    if isinstance(matrix, jax.core.Tracer):
      raise ValueError("energy: expected a rank while tracing, since ranks become shapes")
    return truncate_by_energy(matrix, energy, method=method, key=key)
  return truncate(matrix, min(matrix.shape[-2:]) if rank is None else rank, method=method, key=key)


def _factor(update: Any, shape: tuple[int, ...], truncated: Any) -> tuple[LowRank, jax.Array]:
  """Factors of one expert's update of matrices `[..., m, n]`, none where there is no update, and what they lose."""
  *stack, rows, columns = shape
  exact = jnp.zeros(stack, jnp.float32)
  if update is None:
    return LowRank(jnp.zeros((*stack, rows, 0)), jnp.zeros((*stack, 0, columns))), exact
  if isinstance(update, LowRank):
    return update, exact
  factors: LowRank = jax.block_until_ready(truncated(update))
  return factors, relative_error(update, factors)


def _by_leaf(task_vectors: Any, structure: Any) -> list[tuple[Any, ...]]:
  """For each leaf of the base the K experts' updates of it."""
  stacked = jax.tree.structure(task_vectors) == structure
  if isinstance(task_vectors, list | tuple) and not stacked:
    if not task_vectors:
      raise ValueError("task_vectors: expected at least one expert, got none")
    experts = [_flatten(expert, structure, f"task_vectors[{index}]") for index, expert in enumerate(task_vectors)]
    return list(zip(*experts, strict=True))
  size = check_population(task_vectors, "task_vectors")
  if size == 0:
    raise ValueError("task_vectors: expected at least one expert, got 0 on the leading axis")
  return [tuple(leaf[k] for k in range(size)) for leaf in _flatten(task_vectors, structure, "task_vectors")]


def _flatten(tree: Params, structure: Any, name: str) -> list[Any]:
  """What `tree` has at the leaves of `structure`: arrays, `LowRank`, None."""
  try:
    leaves: list[Any] = structure.flatten_up_to(tree)
  except (TypeError, ValueError) as error:
    reason = str(error).split("[[")[0][:200]  # not the arrays
    raise ValueError(f"{name}: expected the structure of the base's params ({reason})") from error
  return leaves


def _check_update(update: Any, path: Path, leaf: jax.Array, name: str) -> Any:
  """An expert's update as arrays, matrices `[..., m, n]`; raises unless it is finite and of the shape of `leaf`."""
  if update is None:
    return None
  if isinstance(update, LowRank):
    b, a = map(jnp.asarray, update)
    shape = matrix_shape(path, leaf)
    if b.ndim != len(shape) or a.ndim != len(shape) or not is_matrix(path, leaf):
      raise ValueError(f"{name}: expected factors of a matrix of shape {shape}, got {b.shape} and {a.shape}")
    if (*b.shape[:-1], a.shape[-1]) != shape or a.shape[:-2] != shape[:-2] or b.shape[-1] != a.shape[-2]:
      raise ValueError(f"{name}: expected factors [m, r] and [r, n] of shape {shape}, got {b.shape}, {a.shape}")
    update = LowRank(b, a)
  elif not hasattr(update, "shape") or update.shape != leaf.shape:
    raise ValueError(f"{name}: expected shape {leaf.shape}, got {getattr(update, 'shape', type(update).__name__)}")
  else:
    update = as_matrices(path, jnp.asarray(update))
  for array in jax.tree.leaves(update):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name}: expected floats, got {array.dtype}")
    if not _is_finite(array):
      raise ValueError(f"{name}: holds NaN or infinite values")
  return update


def _check_ranks(
  rank: int | Mapping[str, int] | None, energy: float | None, method: str, shortest: Mapping[str, int]
) -> dict[str, int | None]:
  """The rank of each matrix by its path; None: not given."""
  if method not in METHODS:
    raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
  if rank is not None and energy is not None:
    raise ValueError("energy: expected None beside a rank")
  if energy is not None and not (math.isfinite(energy) and 0 < energy <= 1):
    raise ValueError(f"energy: expected a share in (0, 1], got {energy}")
  given: Mapping[str, int] = rank if isinstance(rank, Mapping) else {} if rank is None else {"*": rank}
  if isinstance(rank, Mapping) and not rank:
    raise ValueError("rank: expected a rank by path, got none")
  for name, value in given.items():
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
      raise ValueError(f"rank: expected an integer, got {value!r} for {name}")
    if value < 1:
      raise ValueError(f"rank: expected at least 1, got {value} for {name}")
    if name != "*" and name not in shortest:
      raise ValueError(f"rank: {name!r} is no matrix of the base, which has {', '.join(shortest)}")
  if given and "*" not in given and (missing := shortest.keys() - given.keys()):
    raise ValueError(f"rank: misses {sorted(missing)[0]!r} (give '*' for all that are not named)")
  return {name: given.get(name, given.get("*")) for name in shortest}
