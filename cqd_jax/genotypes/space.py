"""What the genotypes of a search mean: dense task vectors, cores in the experts' space, or merge coefficients.

A space is made from the ROOT space of a run, in which base and experts were read, by a function
`(root, keep, *, setting) -> Space` (a "genotype" plug). Individuals of every space can be written as individuals of the
root space or of another one that stands by itself; there they are scored, so that one individual is one individual,
whichever way it was found.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes.coefficients import apply_coefficients, group_leaves
from cqd_jax.genotypes.core import CoreBasis
from cqd_jax.operators.frames import Frame
from cqd_jax.operators.mutation import factorize
from cqd_jax.operators.task_vectors import apply_task_vector
from cqd_jax.trees import Path, leaf_path
from cqd_jax.types import Genotype, Params

KeepBasis: TypeAlias = Callable[[int, Callable[[], CoreBasis]], CoreBasis]
"""`(rank, make) -> basis`: the basis of that rank that a run keeps on disk; made where there is none yet."""

MakeSpace: TypeAlias = Callable[["Space", KeepBasis], "Space"]
"""A genotype plug with its settings bound."""


@dataclasses.dataclass(frozen=True)
class Space:
  """What a search has to know of its genotypes.

  Attributes:
    name: "dense", "core", "coefficients", or your own.
    frame: the most demanding operators that are exact here; see `cqd_jax.operators.frames`.
    base: params of the base model, leaves `[...]`.
    initial: the population that a search begins with, leaves `[P, ...]`: the experts, as near as the space has them,
      and what `others` names.
    others: what the individuals after the experts are.
    materialize: the params of P individuals, leaves `[P, ...]`; of a space with a parent, the parent's.
    parent: the space in which these individuals are scored and written; None: this one.
    to_parent: P individuals as individuals of `parent`.
    expert_svd: of each expert the factors for `expert_svd_mutation`, leaves `[E, ...]`; None where it has no meaning.
    basis: the core space, if there is one.
    share_base: whether candidates are decoded with the base's weights shared, instead of each with its own.
  """

  name: str
  frame: Frame
  base: Params
  initial: Genotype
  materialize: Callable[[Genotype], Params]
  others: tuple[str, ...] = ()
  parent: "Space | None" = None
  to_parent: Callable[[Genotype], Genotype] | None = None
  expert_svd: Callable[[], Genotype] | None = None
  basis: CoreBasis | None = None
  share_base: bool = False

  @property
  def num_experts(self) -> int:
    """E."""
    return population_size(self.initial) - len(self.others)

  @property
  def experts(self) -> Genotype:
    """The experts as individuals, leaves `[E, ...]`."""
    return jax.tree.map(lambda leaf: leaf[: self.num_experts], self.initial)

  @property
  def scored_in(self) -> "Space":
    """The space in which these individuals are scored and written."""
    return self if self.parent is None else self.parent

  def as_scored(self, population: Genotype) -> Genotype:
    """P individuals, leaves `[P, ...]`, as individuals of `scored_in`."""
    return population if self.to_parent is None else self.to_parent(population)

  def leaves(self, individual: Genotype) -> Iterator[tuple[Path, jax.Array]]:
    """The paths and leaves of one individual's params, one by one."""
    if self.to_parent is not None:
      yield from self.scored_in.leaves(take(self.to_parent(population_of_one(individual)), 0))
    elif self.basis is not None:
      yield from self.basis.materialize_leaves(individual)
    else:
      for key_path, leaf in jax.tree.leaves_with_path(apply_task_vector(self.base, individual)):
        yield leaf_path(key_path), leaf

  def core_of(self, individual: Genotype) -> tuple[CoreBasis, Genotype] | None:
    """One individual as cores, with their basis; None where it is dense."""
    if self.to_parent is not None:
      return self.scored_in.core_of(take(self.to_parent(population_of_one(individual)), 0))
    return None if self.basis is None else (self.basis, individual)


class Candidates(NamedTuple):
  """P individuals, and what they mean.

  Attributes:
    genotypes: leaves `[P, ...]`.
    space: `Space.materialize` gives their params, `Space.core_of` the adapter of one of them.
  """

  genotypes: Genotype
  space: Space

  @property
  def size(self) -> int:
    """P."""
    return population_size(self.genotypes)

  def params_of(self, indices: Sequence[int]) -> Params:
    """The params of some of them, leaves `[I, ...]`."""
    return self.space.materialize(take(self.genotypes, np.asarray(indices)))


def dense_space(base: Params, experts: Genotype) -> Space:
  """Individuals are task vectors with all weights.

  Args:
    base: params of the base model, leaves `[...]`.
    experts: the experts' task vectors, leaves `[E, ...]`.
  """
  return Space(
    name="dense",
    frame="elementwise",
    base=base,
    initial=experts,
    materialize=functools.partial(_add_base, base),
    expert_svd=lambda: jax.vmap(factorize)(experts),
  )


def core_space(basis: CoreBasis, *, share_base: bool = False) -> Space:
  """Individuals are small cores in bases that all experts share."""
  rank = max((rank for ranks in basis.ranks if ranks is not None for rank in ranks), default=1)
  return Space(
    name="core",
    frame="inner_product",
    base=basis.base,
    initial=basis.experts,
    materialize=basis.apply if share_base else functools.partial(_write_out, basis),
    expert_svd=lambda: jax.vmap(functools.partial(factorize, rank=max(rank, 1)))(basis.experts),
    basis=basis,
    share_base=share_base,
  )


def dense(root: Space, keep: KeepBasis) -> Space:
  """All weights of the task vector.

  Raises:
    ValueError: if the experts of the run were only read in core space.
  """
  del keep
  if root.name != "dense":
    raise ValueError(f"genotype: dense, but the experts of this run were read in {root.name} space")
  return root


def core(root: Space, keep: KeepBasis, *, rank: int = 16, share_base: bool = False) -> Space:
  """Small cores in bases that the experts share; children are made a thousand times faster.

  Args:
    root: of the run.
    keep: the run's bases.
    rank: rank to which the experts' task vectors are truncated; 0: not.
    share_base: decode with the base's weights shared by all candidates instead of writing each candidate's out.
  """
  if rank < 0:
    raise ValueError(f"rank: expected at least 0, got {rank}")
  if root.name == "core":
    return root
  basis = keep(rank, lambda: CoreBasis.from_experts(root.base, root.experts, rank=rank or None))
  return core_space(basis, share_base=share_base)


def coefficients(
  root: Space,
  keep: KeepBasis,
  *,
  granularity: str = "kernel",
  starts: tuple[float, ...] = (),
  rank: int | None = None,
  share_base: bool = False,
) -> Space:
  """Merge coefficients `[E, G]`: how much of each expert's task vector, in each of G groups of weights.

  Args:
    root: of the run.
    keep: the run's bases.
    granularity: what shares one coefficient of each expert: model, layer or kernel.
    starts: beside the experts the search begins with all coefficients equal to each of these.
    rank: sum cores of experts truncated to this rank (0: not) instead of the root's experts; None: the root's.
    share_base: with a rank, as of `core`.
  """
  parent = root if rank is None else core(root, keep, rank=rank, share_base=share_base)
  own = parent.experts
  groups = group_leaves(root.base, granularity)
  experts = jnp.repeat(jnp.eye(parent.num_experts)[:, :, None], groups.size, axis=2)
  sums = [jnp.full((1, parent.num_experts, groups.size), scale) for scale in starts]
  merge_all = jax.jit(jax.vmap(lambda each, tree: apply_coefficients(each, tree, groups), in_axes=(0, None)))
  return Space(
    name="coefficients",
    frame="linear",
    base=parent.base,
    initial=jnp.concatenate([experts, *sums]),
    materialize=parent.materialize,
    others=tuple(f"{scale:g} x the experts' sum" for scale in starts),
    parent=parent,
    to_parent=lambda population: merge_all(population, own),
    basis=parent.basis,
    share_base=parent.share_base,
  )


def population_size(population: Genotype) -> int:
  """P, the length of the leaves' leading axis."""
  return int(np.shape(jax.tree.leaves(population)[0])[0])


def take(population: Genotype, index: Any) -> Genotype:
  """One individual of a population, or those of an index array, leaves `[...]` or `[I, ...]`."""
  if isinstance(index, np.ndarray) and index.dtype.kind == "i" and _on_device(population):
    return _take_rows(population, index)  # one program, and not several for each leaf
  return jax.tree.map(lambda leaf: leaf[index], population)


def population_of_one(genotype: Genotype) -> Genotype:
  """An individual with a leading population axis."""
  return jax.tree.map(lambda leaf: leaf[None], genotype)


def _on_device(population: Genotype) -> bool:
  return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(population))


@jax.jit
def _take_rows(population: Genotype, rows: jax.Array) -> Genotype:
  return jax.tree.map(lambda leaf: leaf[rows], population)


@jax.jit
def _add_base(base: Params, task_vectors: Genotype) -> Params:
  return jax.vmap(apply_task_vector, in_axes=(None, 0))(base, task_vectors)


@jax.jit
def _write_out(basis: CoreBasis, population: Genotype) -> Params:
  return jax.vmap(basis.materialize)(population)
