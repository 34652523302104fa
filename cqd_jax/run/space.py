"""How the individuals of an experiment are stored: dense task vectors, cores in the experts' space, or coefficients."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cqd_jax.config.settings import EvolutionSettings
from cqd_jax.genotypes import CoreBasis, apply_coefficients, group_leaves
from cqd_jax.genotypes.placement import place_basis, place_replicated
from cqd_jax.operators import apply_task_vector, factorize
from cqd_jax.run.seeds import markdown
from cqd_jax.store.basis import load_basis, save_basis
from cqd_jax.trees import Path, leaf_path
from cqd_jax.types import Genotype, Params


@dataclasses.dataclass(frozen=True)
class MergeSpace:
  """The experts, what plain merges are made of: dense task vectors, or cores where dense ones would be too large.

  Attributes:
    base: params of the base model.
    experts: the experts as individuals, leaves `[K, ...]`.
    basis: of the cores; None: individuals are dense task vectors.
    share_base: whether the models of a population share the base's weights.
  """

  base: Params
  experts: Genotype
  basis: CoreBasis | None = None
  share_base: bool = False

  def models(self, population: Genotype) -> Params:
    """The params of P individuals, leaves `[P, ...]`."""
    if self.basis is None:
      return materialize(self.base, population)
    return _apply(self.basis, population, share_base=self.share_base)

  def leaves(self, individual: Genotype) -> Iterator[tuple[Path, jax.Array]]:
    """The paths and leaves of one individual's params, one by one."""
    if self.basis is not None:
      yield from self.basis.materialize_leaves(individual)
      return
    for key_path, leaf in jax.tree.leaves_with_path(apply_task_vector(self.base, individual)):
      yield leaf_path(key_path), leaf


@dataclasses.dataclass(frozen=True)
class Space:
  """What evolution has to know of its genotypes.

  Attributes:
    initial: the population that evolution begins with, leaves `[P, ...]`: the K experts, as near as the space has them,
      and what `others` names.
    others: what the individuals after the experts are.
    models: of a population, leaves `[P, ...]`, the params to decode with.
    merged: of one individual, leaves `[...]`, the same in the merge space.
    expert_svd: of each expert the factors for `expert_svd_mutation`, leaves `[K, ...]`; None where it has no meaning.
    basis: the core space, if there is one.
    cores: of one individual, leaves `[...]`, the same in that core space; None if there is none.
  """

  initial: Genotype
  models: Callable[[Genotype], Params]
  merged: Callable[[Genotype], Genotype]
  expert_svd: Callable[[], Genotype] | None
  basis: CoreBasis | None = None
  cores: Callable[[Genotype], Genotype] | None = None
  others: tuple[str, ...] = ()


def make_space(
  settings: EvolutionSettings, merges: MergeSpace, mesh: Mesh | None = None, file: FilePath | None = None
) -> Space:
  """The space that the settings ask for.

  Args:
    settings: `genotype`, and what belongs to it.
    merges: base and experts.
    mesh: where the base goes; None: it stays where it is.
    file: keeps the core space, so that a run goes on in the one that it began in; None: it is not kept.

  Raises:
    ValueError: naming `file`, if it is damaged.
  """
  experts = merges.experts
  if settings.genotype == "dense":
    base = merges.base if mesh is None else place_replicated(merges.base, mesh)
    return Space(
      initial=experts,
      models=functools.partial(materialize, base),
      merged=lambda genotype: genotype,
      expert_svd=lambda: jax.vmap(factorize)(experts),
    )
  basis = merges.basis
  if basis is None:
    basis = keep_basis(
      file, merges.base, lambda: CoreBasis.from_experts(merges.base, experts, rank=settings.rank or None)
    )
    basis = basis if mesh is None else place_basis(basis, mesh)
  to_merge_space = basis.task_vector if merges.basis is None else lambda genotype: genotype
  return (_core_space if settings.genotype == "core" else _coefficient_space)(settings, basis, to_merge_space)


def keep_basis(file: FilePath | None, base: Params, make: Callable[[], CoreBasis]) -> CoreBasis:
  """The basis that a file keeps; made, and kept there, if there is none. None: it is not kept.

  Raises:
    ValueError: naming the file, if it is damaged.
  """
  if file is not None and file.is_file():
    return load_basis(file, base)
  basis = make()
  if file is not None:
    save_basis(file, basis)
  return basis


def describe_basis(basis: CoreBasis, expert_names: Sequence[str]) -> tuple[str, str]:
  """How well the core space holds the experts: a line, and a Markdown table of every matrix."""
  fits = basis.fits()
  worst = min(fits, key=lambda fit: fit.energy)
  kept = sum(fit.energy for fit in fits) / len(fits)
  line = (
    f"core space: {100 * kept:.1f}% of the energy of the experts' task vectors is kept on average over matrices, "
    f"{100 * worst.energy:.1f}% in the worst ({worst.path}, {expert_names[worst.expert]})"
  )
  rows = [
    [fit.path, expert_names[fit.expert], str(fit.rank), f"{fit.energy:.4f}", f"{fit.relative_error:.4f}"]
    for fit in fits
  ]
  return line, markdown(["matrix (of a stack: its worst layer)", "expert", "rank", "energy", "relative error"], rows)


@jax.jit
def materialize(base: Params, task_vectors: Genotype) -> Params:
  """The params of P models, leaves `[P, ...]`."""
  return jax.vmap(apply_task_vector, in_axes=(None, 0))(base, task_vectors)


def _core_space(settings: EvolutionSettings, basis: CoreBasis, to_merge_space: Callable[[Any], Any]) -> Space:
  rank = max((rank for ranks in basis.ranks if ranks is not None for rank in ranks), default=1)
  return Space(
    initial=basis.experts,
    models=functools.partial(_apply, basis, share_base=settings.share_base),
    merged=to_merge_space,
    cores=lambda genotype: genotype,
    expert_svd=lambda: jax.vmap(functools.partial(factorize, rank=rank))(basis.experts),
    basis=basis,
  )


def _coefficient_space(settings: EvolutionSettings, basis: CoreBasis, to_merge_space: Callable[[Any], Any]) -> Space:
  """Merge coefficients `[K, groups]`; beside the experts, task arithmetic with a few scales is where it begins."""
  groups = group_leaves(basis.base, settings.coefficient_granularity)
  experts = jnp.repeat(jnp.eye(basis.num_experts)[:, :, None], groups.size, axis=2)
  sums = [jnp.full((1, basis.num_experts, groups.size), scale) for scale in settings.coefficient_starts]

  def merge(coefficients: jax.Array, cores: Genotype) -> Genotype:
    return apply_coefficients(coefficients, cores, groups)

  merge_all = jax.jit(jax.vmap(merge, in_axes=(0, None)))
  return Space(
    initial=jnp.concatenate([experts, *sums]),
    models=lambda population: _apply(basis, merge_all(population, basis.experts), share_base=settings.share_base),
    merged=lambda genotype: to_merge_space(merge(genotype, basis.experts)),
    cores=lambda genotype: merge(genotype, basis.experts),
    expert_svd=None,
    basis=basis,
    others=tuple(f"{scale:g} x the experts' sum" for scale in settings.coefficient_starts),
  )


def _apply(basis: CoreBasis, population: Genotype, *, share_base: bool) -> Params:
  """Cores as models: the base shared by all, or every weight written out."""
  return basis.apply(population) if share_base else _write_out(basis, population)


@jax.jit
def _write_out(basis: CoreBasis, population: Genotype) -> Params:
  return jax.vmap(basis.materialize)(population)
