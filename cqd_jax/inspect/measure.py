"""Measures experts against their base, leaf by leaf and of a stack layer by layer; no model is ever whole in memory."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from cqd_jax.genotypes.spectra import (
  Change,
  captured_energy,
  inner_product,
  singular_values,
  spectral_similarity,
)
from cqd_jax.hub.experts import Expert
from cqd_jax.hub.load import ModelFolder
from cqd_jax.hub.tensor_files import Reader
from cqd_jax.low_rank import LowRank
from cqd_jax.models.hf_layout import Placement
from cqd_jax.trees import STACK
from cqd_jax.trees import Path as TreePath

KINDS = ("attention", "mlp", "embedding", "head", "norms", "biases")
"""Kinds of modules; biases and norms are counted as such wherever they are."""


@dataclasses.dataclass(frozen=True)
class InspectedExpert:
  """What was measured of one expert. Its energy is the squared norm of its task vector.

  Attributes:
    name: by which it is known.
    folder: where it is.
    kind: in words.
    is_adapter: whether it is an adapter, and not a full model.
    ranks: of an adapter's modules, each once, rising.
    dtype: in which most of its weights are; of an adapter every one that its factors have.
    num_bytes: of its weights on disk.
    declared_base: what an adapter says that its base is; None: nothing.
    num_changed: weights of the base that it changes; of a matrix that an adapter changes all are counted.
    norm: of its task vector.
    shares: of its energy by kind of module, in [0, 1]; all 0 if it is the base.
    energy: share of the energy of its matrices that is held by the best approximation of each of them by rank 1,
      2, ...; NaN if it changes no matrix.
    sampled: whether singular values of some matrix were sampled, so that `energy` is a lower bound.
  """

  name: str
  folder: Path
  kind: str
  is_adapter: bool
  ranks: tuple[int, ...]
  dtype: str
  num_bytes: int
  declared_base: str | None
  num_changed: int
  norm: float
  shares: Mapping[str, float]
  energy: Float[np.ndarray, " R"]
  sampled: bool

  def rank_of(self, share: float) -> int | None:
    """The least rank that holds a share of the energy of matrices; None: more than was measured, or no matrix."""
    enough = self.energy >= share * (1 - 1e-6)  # singular values are of float32: all of it must be reachable
    return int(enough.argmax()) + 1 if enough.any() else None


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What was measured of a base and its experts; K experts that fit, in the order in which they were given.

  Attributes:
    base: the base model.
    num_parameters: of the base.
    base_norm: of all weights of the base.
    num_matrices: of the base, layers counted one by one.
    experts: those that fit.
    misfits: why the others do not, by their names.
    cosines: of pairs of whole task vectors; NaN where one of them is zero.
    similarities: CycleQD's similarity of pairs: the mean over the matrices that BOTH changed of the cosine of their
      singular values (a matrix that one of them did not change has none to compare, and is left out); NaN if there is
      no such matrix. Of large matrices that are not factors the leading `max_rank` singular values count.
    num_shared: how many matrices those are.
    max_rank: up to which energy was measured.
  """

  base: ModelFolder
  num_parameters: int
  base_norm: float
  num_matrices: int
  experts: tuple[InspectedExpert, ...]
  misfits: Mapping[str, str]
  cosines: Float[np.ndarray, "K K"]
  similarities: Float[np.ndarray, "K K"]
  num_shared: Int[np.ndarray, "K K"]
  max_rank: int


def measure(
  base: ModelFolder,
  experts: Mapping[str, Expert],
  *,
  max_rank: int,
  on_part: Callable[[int, str], None],
) -> Inspection:
  """Measures experts that were opened.

  An expert in whose weights something is found that cannot be, as a NaN, becomes a misfit.

  Args:
    base: the base model.
    experts: by name; at least one.
    max_rank: up to which energy is measured, at least 1; large matrices are sampled to this rank.
    on_part: called after each part of the model with the number of bytes (see `num_bytes`), and the part's name.

  Raises:
    DamagedWeights: naming file and tensor of the base.
  """
  sums = _Sums(len(experts), max_rank)
  misfits: dict[str, str] = {}
  base_energy = 0.0
  with Reader() as reader:
    sources = {name: _Changes(expert, reader) for name, expert in experts.items()}
    for placement, layer in _parts(base):
      before = base.read_part(reader, placement.path, _slices(placement, layer), np.float32)
      before = before if layer is None else before[0]
      base_energy += inner_product(before, before)
      changes: list[Change] = []
      for name, source in sources.items():
        try:
          changes.append(None if name in misfits else source.of(placement, layer, before))
        except ValueError as error:
          misfits[name] = str(error)
          changes.append(None)
      if len(misfits) == len(experts):
        break
      sums.add(placement, changes, before.size)
      on_part(_part_bytes(base, experts.values(), placement, layer), _part_name(placement, layer))
  return _concluded(base, experts, misfits, sums, base_energy)


def num_bytes(base: ModelFolder, experts: Iterable[Expert]) -> int:
  """What `measure` will read in all."""
  every = tuple(experts)
  return sum(_part_bytes(base, every, *part) for part in _parts(base))


class _Sums:
  """What is summed up over all parts of K experts."""

  def __init__(self, size: int, max_rank: int):
    self.max_rank = max_rank
    self.inner: Float[np.ndarray, "K K"] = np.zeros((size, size))
    self.similarities: Float[np.ndarray, "K K"] = np.zeros((size, size))
    self.num_shared: Int[np.ndarray, "K K"] = np.zeros((size, size), int)
    self.by_kind: dict[str, Float[np.ndarray, " K"]] = {kind: np.zeros(size) for kind in KINDS}
    self.in_matrices: Float[np.ndarray, " K"] = np.zeros(size)
    self.captured: Float[np.ndarray, "K R"] = np.zeros((size, max_rank))
    self.num_changed: Int[np.ndarray, " K"] = np.zeros(size, int)
    self.sampled: Bool[np.ndarray, " K"] = np.zeros(size, bool)

  def add(self, placement: Placement, changes: Sequence[Change], size: int) -> None:
    """Adds one part of `size` weights: of each expert its change, or None."""
    energies = {k: inner_product(change, change) for k, change in enumerate(changes) if change is not None}
    energies = {k: energy for k, energy in energies.items() if energy > 0}
    spectra = {}
    for k, energy in energies.items():
      change = changes[k]
      self.inner[k, k] += energy
      self.by_kind[kind_of(placement.path)][k] += energy
      self.num_changed[k] += size if isinstance(change, LowRank) else np.count_nonzero(change)
      if _is_matrix(placement):
        spectra[k] = singular_values(change, most=self.max_rank)
        self.in_matrices[k] += energy
        self.captured[k] += captured_energy(spectra[k], energy, self.max_rank)
        self.sampled[k] |= spectra[k].sampled
      for other in (other for other in energies if other < k):
        self.inner[[k, other], [other, k]] += inner_product(change, changes[other])
        if spectra:
          self.similarities[[k, other], [other, k]] += spectral_similarity(spectra[k], spectra[other])
    for k in spectra:
      self.num_shared[k, list(spectra)] += 1
      self.similarities[k, k] += 1.0


class _Changes:
  """The changes of one expert, part by part; an adapter's factors of one leaf are held at a time."""

  def __init__(self, expert: Expert, reader: Reader):
    self._expert, self._reader = expert, reader
    self._held: tuple[TreePath, Change] = ((), None)

  def of(self, placement: Placement, layer: int | None, before: np.ndarray) -> Change:
    """The change of a part whose weights in the base are `before`; None: an adapter that leaves it as it is."""
    if layer is None:
      return self._expert.update(self._reader, placement.path)
    if self._expert.model is not None:
      part = _slices(placement, layer)
      after = self._expert.model.read_part(self._reader, placement.path, part, np.float32)[0]
      after -= before
      return after
    if self._held[0] != placement.path:
      self._held = placement.path, self._expert.update(self._reader, placement.path)
    factors = self._held[1]
    return None if factors is None else LowRank(factors.b[layer], factors.a[layer])


def kind_of(path: TreePath) -> str:
  """To which of `KINDS` a leaf belongs."""
  by_leaf = {"bias": "biases", "scale": "norms"}
  by_module = {"embed": "embedding", "head": "head"}
  return by_leaf.get(path[-1]) or by_module.get(path[0]) or path[1]


def _is_matrix(placement: Placement) -> bool:
  return len(placement.tensor_shape) == 2


def _parts(base: ModelFolder) -> Iterator[tuple[Placement, int | None]]:
  """What is in memory at once: a layer of a stack of matrices, or a whole leaf (None)."""
  for placement in base.placements.values():
    layers = range(placement.shape[0]) if placement.stacked and _is_matrix(placement) else (None,)
    yield from ((placement, layer) for layer in layers)


def _slices(placement: Placement, layer: int | None) -> tuple[slice, ...]:
  whole = (slice(None),) * len(placement.shape)
  return whole if layer is None else (slice(layer, layer + 1), *whole[1:])


def _part_name(placement: Placement, layer: int | None) -> str:
  module = "/".join(name for name in placement.path[:-1] if name != STACK)
  return module if layer is None else f"{module} {layer}"


def _part_bytes(base: ModelFolder, experts: Iterable[Expert], placement: Placement, layer: int | None) -> int:
  """Bytes of a part on disk, of the base and of all experts."""
  names = placement.names if layer is None else (placement.names[layer],)
  return sum(base.tensors[name].num_bytes + sum(_tensor_bytes(one, name) for one in experts) for name in names)


def _tensor_bytes(expert: Expert, name: str) -> int:
  """Bytes that an expert has of a tensor of the base."""
  if expert.model is not None:
    return expert.model.tensors[name].num_bytes
  assert expert.adapter is not None
  module = expert.adapter.modules.get(name.removesuffix(".weight"))
  own = [expert.adapter.replaced.get(name)] if module is None else [module.a, module.b]
  return sum(tensor.num_bytes for tensor in own if tensor is not None)


def _concluded(
  base: ModelFolder, experts: Mapping[str, Expert], misfits: Mapping[str, str], sums: _Sums, base_energy: float
) -> Inspection:
  """The figures of the experts in which nothing was found that cannot be."""
  kept = [k for k, name in enumerate(experts) if name not in misfits]
  among = np.ix_(kept, kept)
  norms = np.sqrt(sums.inner.diagonal())[kept]
  with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as promised
    cosines = np.clip(sums.inner[among] / norms[:, None] / norms, -1.0, 1.0)
    similarities = sums.similarities[among] / sums.num_shared[among]
  parts = list(_parts(base))
  return Inspection(
    base=base,
    num_parameters=sum(int(np.prod(placement.shape)) for placement in base.placements.values()),
    base_norm=base_energy**0.5,
    num_matrices=sum(_is_matrix(placement) for placement, _ in parts),
    experts=tuple(_concluded_expert(name, experts[name], sums, k) for k, name in enumerate(experts) if k in kept),
    misfits=misfits,
    cosines=cosines,
    similarities=similarities,
    num_shared=sums.num_shared[among],
    max_rank=sums.max_rank,
  )


def _concluded_expert(name: str, expert: Expert, sums: _Sums, k: int) -> InspectedExpert:
  energy = float(sums.inner[k, k])
  with np.errstate(invalid="ignore"):
    by_rank = sums.captured[k] / sums.in_matrices[k]
  modules = () if expert.adapter is None else tuple(expert.adapter.modules.values())
  dtypes = {tensor.dtype for module in modules for tensor in (module.a, module.b)}
  declared = None if expert.adapter is None else expert.adapter.content.get("base_model_name_or_path")
  return InspectedExpert(
    name=name,
    folder=expert.folder,
    kind=expert.kind,
    is_adapter=expert.adapter is not None,
    ranks=tuple(sorted({module.a.shape[0] for module in modules})),
    dtype=", ".join(sorted(map(str, {expert.model.dtype} if expert.model else dtypes))),
    num_bytes=expert.num_bytes,
    declared_base=declared if isinstance(declared, str) else None,
    num_changed=int(sums.num_changed[k]),
    norm=energy**0.5,
    shares={kind: float(own[k]) / energy if energy else 0.0 for kind, own in sums.by_kind.items()},
    energy=by_rank,
    sampled=bool(sums.sampled[k]),
  )
