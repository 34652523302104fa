"""How the individuals of an experiment are stored: dense task vectors, cores in the experts' space, or coefficients."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cqd_jax.config import EvolutionSettings
from cqd_jax.experiment.seeds import markdown
from cqd_jax.genotypes import CoreBasis, apply_coefficients, group_leaves
from cqd_jax.genotypes.placement import place_basis, place_replicated
from cqd_jax.io.basis import load_basis, save_basis
from cqd_jax.operators import apply_task_vector, factorise
from cqd_jax.types import Genotype, Params


@dataclasses.dataclass(frozen=True)
class Space:
  """What evolution has to know of its genotypes.

  Attributes:
    initial: the population that evolution begins with, leaves `[P, ...]`: the K experts, as near as the space has them,
      and what `others` names.
    others: what the individuals after the experts are.
    models: of a population, leaves `[P, ...]`, the params to decode with.
    task_vector: of one individual, leaves `[...]`, the dense task vector.
    expert_svd: of each expert the factors for `expert_svd_mutation`, leaves `[K, ...]`; None where it has no meaning.
    basis: the core space, if there is one.
  """

  initial: Genotype
  models: Callable[[Genotype], Params]
  task_vector: Callable[[Genotype], Params]
  expert_svd: Callable[[], Genotype] | None
  basis: CoreBasis | None = None
  others: tuple[str, ...] = ()


def make_space(
  settings: EvolutionSettings, base: Params, experts: Params, mesh: Mesh | None = None, file: Path | None = None
) -> Space:
  """The space that the settings ask for.

  Args:
    settings: `genotype`, and what belongs to it.
    base: params of the base model.
    experts: dense task vectors, leaves `[K, ...]`.
    mesh: where the base goes; None: it stays where it is.
    file: keeps the core space, so that a run goes on in the one that it began in; None: it is not kept.

  Raises:
    ValueError: naming `file`, if it is damaged.
  """
  if settings.genotype == "dense":
    base = base if mesh is None else place_replicated(base, mesh)
    return Space(
      initial=experts,
      models=functools.partial(materialise, base),
      task_vector=lambda genotype: genotype,
      expert_svd=lambda: jax.vmap(factorise)(experts),
    )
  if file is not None and file.is_file():
    basis = load_basis(file, base)
  else:
    basis = CoreBasis.from_experts(base, experts, rank=settings.rank or None)
    if file is not None:
      save_basis(file, basis)
  basis = basis if mesh is None else place_basis(basis, mesh)
  return (_core_space if settings.genotype == "core" else _coefficient_space)(settings, basis)


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
def materialise(base: Params, task_vectors: Genotype) -> Params:
  """The params of P models, leaves `[P, ...]`."""
  return jax.vmap(apply_task_vector, in_axes=(None, 0))(base, task_vectors)


def _core_space(settings: EvolutionSettings, basis: CoreBasis) -> Space:
  rank = max((rank for ranks in basis.ranks if ranks is not None for rank in ranks), default=1)
  return Space(
    initial=basis.experts,
    models=_models(settings, basis),
    task_vector=basis.task_vector,
    expert_svd=lambda: jax.vmap(functools.partial(factorise, rank=rank))(basis.experts),
    basis=basis,
  )


def _coefficient_space(settings: EvolutionSettings, basis: CoreBasis) -> Space:
  """Merge coefficients `[K, groups]`; beside the experts, task arithmetic with a few scales is where it begins."""
  groups = group_leaves(basis.base, settings.coefficient_granularity)
  experts = jnp.repeat(jnp.eye(basis.num_experts)[:, :, None], groups.size, axis=2)
  sums = [jnp.full((1, basis.num_experts, groups.size), scale) for scale in settings.coefficient_starts]
  models = _models(settings, basis)

  def merge(coefficients: jax.Array, cores: Genotype) -> Genotype:
    return apply_coefficients(coefficients, cores, groups)

  merge_all = jax.jit(jax.vmap(merge, in_axes=(0, None)))
  return Space(
    initial=jnp.concatenate([experts, *sums]),
    models=lambda population: models(merge_all(population, basis.experts)),
    task_vector=lambda genotype: basis.task_vector(merge(genotype, basis.experts)),
    expert_svd=None,
    basis=basis,
    others=tuple(f"{scale:g} x the experts' sum" for scale in settings.coefficient_starts),
  )


def _models(settings: EvolutionSettings, basis: CoreBasis) -> Callable[[Genotype], Params]:
  """Cores as models: the base shared by all, or every weight written out."""
  if settings.share_base:
    return basis.apply
  write_out: Any = jax.jit(lambda basis, genotypes: jax.vmap(basis.materialise)(genotypes))
  return functools.partial(write_out, basis)
