"""Writes individuals of a core space as PEFT LoRA adapters, which peft, transformers and vLLM serve from one base."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes import CoreBasis
from cqd_jax.hub.load_adapter import ADAPTER_CONFIG, PREFIX
from cqd_jax.hub.save import whole_folder, write_tensors
from cqd_jax.hub.tensor_files import check_dtype
from cqd_jax.models.config import DecoderConfig
from cqd_jax.models.hf_layout import Placement, placements
from cqd_jax.store.run_dir import write_json, write_text
from cqd_jax.trees import leaf_path
from cqd_jax.types import Genotype

NOISE = 8 * float(np.finfo(np.float32).eps)
"""Singular values below this share of the largest of their matrix are rounding."""


class Written(NamedTuple):
  """What an adapter holds of its individual.

  Attributes:
    rank: of every module.
    relative_error: what is left out, over the norm of the whole task vector; 0 where nothing is.
    vectors: whether it holds norms or biases, which vLLM does not take.
    left_out: leaves that are left out.
    embeddings: whether it changes the embedding or the head, which vLLM does not take of every architecture.
  """

  rank: int
  relative_error: float
  vectors: bool
  left_out: tuple[str, ...]
  embeddings: bool


EMBEDDINGS = (("embed", "embedding"), ("head", "kernel"))
"""Paths of the leaves that turn tokens into states and states into tokens."""


class _Svd(NamedTuple):
  """The task vector of one leaf of matrices by its singular values, float64, `[L, ...]` or `[1, ...]`.

  Its singular vectors are `left @ u` and `right @ vt^T`.
  """

  placement: Placement
  left: np.ndarray
  u: np.ndarray
  s: np.ndarray
  vt: np.ndarray
  right: np.ndarray


def save_adapter(
  folder: str | os.PathLike[str],
  basis: CoreBasis,
  genotype: Genotype,
  config: DecoderConfig,
  *,
  base_name: str,
  rank: int | None = None,
  dtype: jax.typing.DTypeLike = jnp.float32,
  keep_vectors: bool = True,
  keep_embeddings: bool = True,
  card: str = "",
) -> Written:
  """Writes one individual of a core space as a LoRA adapter of its base; it appears whole or not at all.

  Every module gets the same rank, with lora_alpha = r, so that the change is B A itself.

  Args:
    folder: must not exist.
    basis: the core space.
    genotype: the individual, leaves `[...]`.
    config: the decoder of the base.
    base_name: what the adapter says that its base is: a folder or a name on the hub.
    rank: of every module; None: the smallest that is exact.
    dtype: of the factors: float32, bfloat16 or float16.
    keep_vectors: whether changed norms (modules_to_save) and biases (bias) are written too. Left out, they count in the
      error; an adapter without them is one that vLLM takes.
    keep_embeddings: likewise for changes of the embedding and the head.
    card: content of `README.md`.

  Returns:
    The rank, and what is lost by it.

  Raises:
    ValueError: if the folder exists, `rank` is below 1, the genotype is of another basis, is not finite or does not
      fit `dtype`; if `dtype` is another, or `config` not the decoder of the base.
  """
  if rank is not None and rank < 1:
    raise ValueError(f"rank: expected at least 1, got {rank}")
  check_dtype(dtype)
  every = list(_decompose(basis, genotype, config))
  svds = [svd for svd in every if keep_embeddings or svd.placement.path not in EMBEDDINGS]
  dropped = [svd for svd in every if not keep_embeddings and svd.placement.path in EMBEDDINGS and svd.s.any()]
  exact = max((_numerical_rank(svd.s) for svd in svds), default=0)
  chosen = max(1, exact if rank is None else min(rank, max(exact, 1)))
  vectors = _vectors(basis, genotype, config)
  lost = sum(float((svd.s[:, chosen:] ** 2).sum()) for svd in svds) if chosen < exact else 0.0
  lost += sum(float((svd.s**2).sum()) for svd in dropped)
  total = sum(float((svd.s**2).sum()) for svd in every) + sum(float((own**2).sum()) for _, own in vectors)
  changed = [(placement, own) for placement, own in vectors if own.any()]
  left_out = ["/".join(svd.placement.path) for svd in dropped]
  if not keep_vectors:
    lost += sum(float((own**2).sum()) for _, own in changed)
    left_out += ["/".join(placement.path) for placement, _ in changed]
    changed = []
  tensors: dict[str, np.ndarray] = {}
  targets = set()
  # An adapter must have a module, if only one that changes nothing.
  query = next(svd for svd in svds if svd.placement.path[-2:] == ("query", "kernel"))
  for svd in [svd for svd in svds if svd.s.any()] or [query]:
    tensors |= {name: _cast(factor, dtype, name) for name, factor in _factors(svd, chosen, tied=config.tie_embeddings)}
    targets |= _targets(svd.placement, tied=config.tie_embeddings)
  tensors |= _whole_vectors(basis, vectors, changed, targets)
  with whole_folder(Path(folder)) as unfinished:
    write_tensors(unfinished / "adapter_model.safetensors", tensors)
    write_json(unfinished / ADAPTER_CONFIG, _settings(base_name, chosen, targets, changed))
    if card:
      write_text(unfinished / "README.md", card)
  embeddings = any(svd.placement.path in EMBEDDINGS and svd.s.any() for svd in svds)
  return Written(chosen, (lost / total) ** 0.5 if total else 0.0, bool(changed), tuple(left_out), embeddings)


def _settings(
  base_name: str, rank: int, targets: set[str], changed: list[tuple[Placement, np.ndarray]]
) -> dict[str, Any]:
  """The content of `adapter_config.json`."""
  kinds = {placement.path[-1] for placement, _ in changed}
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_name,
    "r": rank,
    "lora_alpha": rank,
    "lora_dropout": 0.0,
    "target_modules": sorted(targets),
    "bias": "all" if "bias" in kinds else "none",
    "modules_to_save": ["norm"] if "scale" in kinds else None,  # by their endings: all norms
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
  }


def _decompose(basis: CoreBasis, genotype: Genotype, config: DecoderConfig) -> Iterator[_Svd]:
  """The singular values of every leaf of matrices."""
  for placement, leaf, left, right in _by_leaf(basis, genotype, config):
    if left is None:
      continue
    core = leaf
    bases = [np.asarray(own, np.float32).astype(np.float64) for own in (left, right)]
    if not placement.stacked:
      core, *bases = (array[None] for array in (core, *bases))
    # Bases that were rounded, as to bfloat16, are orthonormal no longer: each is orthonormal columns times its root.
    left_root, right_root = (np.linalg.cholesky(own.mT @ own).mT for own in bases)
    u, s, vt = np.linalg.svd(left_root @ core @ right_root.mT, full_matrices=False)
    s = np.where(s > NOISE * s.max(axis=-1, keepdims=True), s, 0.0)
    u, v = np.linalg.solve(left_root, u), np.linalg.solve(right_root, vt.mT)
    yield _Svd(placement, bases[0], u, s, v.mT, bases[1])


def _by_leaf(basis: CoreBasis, genotype: Genotype, config: DecoderConfig) -> Iterator[tuple[Placement, Any, Any, Any]]:
  """Of each leaf its placement, the genotype's own in float64, checked, and the two bases (None at vectors)."""
  wanted = {placement.path: placement for placement in placements(config)}
  structure: Any = jax.tree.structure(basis.base)
  if jax.tree.structure(genotype) != structure:
    raise ValueError("genotype: expected the structure of the base's params, and a core or a vector at each leaf")
  shapes = {leaf_path(key_path): leaf.shape for key_path, leaf in jax.tree.leaves_with_path(basis.base)}
  if shapes != {path: placement.shape for path, placement in wanted.items()}:
    raise ValueError("config: is not the decoder of the basis's base")
  columns = (structure.flatten_up_to(tree) for tree in (genotype, basis.experts, basis.left, basis.right))
  for path, own, expert, left, right in zip(shapes, *columns, strict=True):
    if np.shape(own) != expert.shape[1:]:
      raise ValueError(f"genotype at {'/'.join(path)}: expected shape {expert.shape[1:]}, got {np.shape(own)}")
    numbers = np.asarray(own, np.float64)
    if not np.isfinite(numbers).all():
      raise ValueError(f"genotype at {'/'.join(path)}: holds NaN or infinite values; nothing was written")
    yield wanted[path], numbers, left, right


def _numerical_rank(s: np.ndarray) -> int:
  return int((s > 0).sum(axis=-1).max(initial=0))


def _factors(svd: _Svd, rank: int, *, tied: bool) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors A and B of each module of a leaf; zeros beyond the rank that there is."""
  for layer, name in enumerate(svd.placement.names):
    root = np.sqrt(svd.s[layer, :rank])
    rows = (svd.left[layer] @ svd.u[layer, :, :rank] * root).T
    columns = svd.right[layer] @ svd.vt[layer, :rank].T * root
    rows = np.pad(rows, ((0, rank - len(root)), (0, 0)))
    columns = np.pad(columns, ((0, 0), (0, rank - len(root))))
    module = PREFIX + name.removesuffix(".weight")
    if svd.placement.path == ("embed", "embedding"):
      yield f"{module}.lora_embedding_A", rows
      yield f"{module}.lora_embedding_B", columns
      if tied:
        yield f"{PREFIX}lm_head.lora_A.weight", columns.T
        yield f"{PREFIX}lm_head.lora_B.weight", rows.T
    else:
      yield f"{module}.lora_A.weight", rows
      yield f"{module}.lora_B.weight", columns


def _cast(factor: np.ndarray, dtype: jax.typing.DTypeLike, name: str) -> np.ndarray:
  with np.errstate(over="ignore"):
    cast = factor.astype(dtype)
  if not np.isfinite(cast.astype(np.float32)).all():
    raise ValueError(f"genotype: {name} does not fit in {np.dtype(dtype)}; nothing was written")
  return cast


def _targets(placement: Placement, *, tied: bool) -> set[str]:
  """The endings of names by which PEFT finds the modules."""
  own = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in placement.names}
  return own | {"lm_head"} if tied and placement.path == ("embed", "embedding") else own


def _vectors(basis: CoreBasis, genotype: Genotype, config: DecoderConfig) -> list[tuple[Placement, np.ndarray]]:
  """The changes of all leaves of vectors."""
  return [(placement, own) for placement, own, left, _ in _by_leaf(basis, genotype, config) if left is None]


def _whole_vectors(
  basis: CoreBasis,
  vectors: list[tuple[Placement, np.ndarray]],
  changed: list[tuple[Placement, np.ndarray]],
  targets: set[str],
) -> dict[str, np.ndarray]:
  """Base plus change of all norms if one is changed, of all biases if one is: PEFT has them all or none."""
  kinds = {placement.path[-1] for placement, _ in changed}
  base = {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(basis.base)}
  tensors = {}
  for placement, own in vectors:
    if placement.path[-1] not in kinds:
      continue
    whole = np.asarray(base[placement.path], np.float32) + own
    for name, row in zip(placement.names, whole if placement.stacked else whole[None], strict=True):
      module, ending = name.rsplit(".", 1)
      wrapped = ".base_layer" if ending == "bias" and module.rsplit(".", 1)[-1] in targets else ""
      tensors[f"{PREFIX}{module}{wrapped}.{ending}"] = row.astype(np.float32)
  return tensors
