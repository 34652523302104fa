"""What an inspection means for merging, in sentences; what is a rule of thumb and not measured is called one."""

import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from cqd_jax.inspect.measure import InspectedExpert, Inspection

ALIKE, ORTHOGONAL = 0.95, 0.1
"""Cosines: above the one two experts are nearly the same, within the other they are nearly orthogonal."""

DOMINATES = 5.0
"""From this ratio of norms on one expert dominates a merge with equal weights."""

MOST, NEARLY_ALL = 0.9, 0.99
"""Shares of the energy for which a rank is named."""

MEANINGS = {
  "nearly the same": (
    f"one of them adds little to the other (rule of thumb: above {ALIKE}). Is one a copy of the other, or a later "
    "checkpoint?"
  ),
  "overlapping": (
    "part of what they have learnt is common, and in a sum it counts twice. Rule of thumb: start from merge weights "
    "that add up to about 1."
  ),
  "nearly orthogonal": (
    f"their changes hardly meet, so that merging interferes little, which is good (rule of thumb: within {ORTHOGONAL} "
    "of 0). What an average shrinks, a sum keeps."
  ),
  "opposed": (
    "along what they have in common one undoes what the other does. Rule of thumb: give them different weights for "
    "each layer or kernel, or sparsify them first."
  ),
}
"""What the relation of two experts means for merging them."""


def advice(inspection: Inspection) -> list[str]:
  """The sentences, in the order of their weight; each follows from figures of the inspection."""
  changed = [expert for expert in inspection.experts if expert.norm > 0]
  return [
    *_equal_to_base(inspection),
    *_pairs(inspection),
    *_norms(changed),
    *_ranks(changed, inspection.max_rank),
    *_vectors(changed),
    *_tied(changed, inspection),
    *_rounding(changed, inspection),
    *_declared(inspection),
  ]


def relation(cosine: float) -> str:
  """What a cosine of two task vectors is called."""
  if cosine > ALIKE:
    return "nearly the same"
  if cosine > ORTHOGONAL:
    return "overlapping"
  if cosine >= -ORTHOGONAL:
    return "nearly orthogonal"
  return "opposed"


def _equal_to_base(inspection: Inspection) -> Iterator[str]:
  if same := [expert.name for expert in inspection.experts if expert.norm == 0]:
    one = len(same) == 1
    yield (
      f"{_listed(same)} {'is' if one else 'are'} equal to the base: no weight differs. Averaged with others "
      f"{'it' if one else 'they'} would only shrink what those have learnt: leave {'it' if one else 'them'} out."
    )


def _pairs(inspection: Inspection) -> Iterator[str]:
  """One sentence for each relation that there is."""
  changed = [k for k, expert in enumerate(inspection.experts) if expert.norm > 0]
  found: dict[str, list[tuple[int, int]]] = {}
  for pair in itertools.combinations(changed, 2):
    found.setdefault(relation(float(inspection.cosines[pair])), []).append(pair)
  for kind, pairs in found.items():
    names = [" and ".join(inspection.experts[k].name for k in pair) for pair in pairs]
    which = "All pairs" if len(found) == 1 and len(pairs) > 1 else _listed(names, "; ", "; ")
    cosines = [round(float(inspection.cosines[pair]), 2) + 0.0 for pair in pairs]  # + 0.0: no -0.00
    low, high = min(cosines), max(cosines)
    between = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
    yield f"{which}: {kind} (cosine {between}): {MEANINGS[kind]}"


def _norms(changed: list[InspectedExpert]) -> Iterator[str]:
  if not changed:
    return
  longest, shortest = (choose(changed, key=lambda expert: expert.norm) for choose in (max, min))
  ratio = longest.norm / shortest.norm
  if ratio > DOMINATES:
    yield (
      f"The task vector of {longest.name} is {ratio:.1f} times as long as that of {shortest.name} ({longest.norm:.3g} "
      f"and {shortest.norm:.3g}): with equal merge weights it dominates (rule of thumb: from a factor of "
      f"{DOMINATES:g} on). Start from weights in inverse proportion to the norms."
    )


def _ranks(changed: list[InspectedExpert], max_rank: int) -> Iterator[str]:
  """What truncation to core space would keep; adapters lose nothing."""
  if adapters := [expert for expert in changed if expert.ranks]:
    own = [f"{expert.name} ({_rank_text(expert.ranks)})" for expert in adapters]
    verb, what = ("is a LoRA adapter", "its") if len(own) == 1 else ("are LoRA adapters", "their")
    yield f"{_listed(own)} {verb}: core space holds {what} matrices exactly, whatever --evolution.rank says."
  full = [expert for expert in changed if not expert.is_adapter and expert.energy[-1] > 0]
  reached = {expert.name: rank for expert in full if (rank := expert.rank_of(MOST)) is not None}
  if reached:
    rank = max(reached.values())
    kept = [f"{expert.name} {expert.energy[rank - 1]:.1%}" for expert in full if expert.name in reached]
    most = [expert.rank_of(NEARLY_ALL) for expert in full if expert.name in reached]
    more = f"more than {max_rank}" if None in most else str(max(each for each in most if each is not None))
    yield (
      f"Rank {rank} keeps at least {MOST:.0%} of the energy in matrices ({_listed(kept)}), and {NEARLY_ALL:.0%} needs "
      f"{more}: --evolution.genotype core --evolution.rank {rank} is a start. That {MOST:.0%} of the energy is enough "
      "is a rule of thumb; only scores show what the rest costs in skill."
    )
  if spread := [f"{expert.name} {expert.energy[-1]:.1%}" for expert in full if expert.name not in reached]:
    yield (
      f"Not of low rank: of the energy in matrices rank {max_rank} keeps {_listed(spread)}. Core space of that rank "
      "loses the rest: give a larger --evolution.rank, or evolve all weights (--evolution.genotype dense)."
    )


def _vectors(changed: list[InspectedExpert]) -> Iterator[str]:
  if own := _holders(changed, "norms", "biases"):
    yield (
      f"Changed vectors: {_listed(own)}. An adapter exported from a merge with them holds them beside its factors, and "
      "vLLM serves no such adapter: leave them out of it (cqd export --drop-vectors), or export a full model."
    )


def _tied(changed: list[InspectedExpert], inspection: Inspection) -> Iterator[str]:
  own = _holders(changed, "embedding")
  if own and inspection.base.config.tie_embeddings:
    yield (
      f"Changed embedding: {_listed(own)}. It is the base's head as well (tie_word_embeddings), so that its merge "
      "weight acts on how tokens are read and on how they are chosen."
    )


def _holders(changed: list[InspectedExpert], *kinds: str) -> list[str]:
  """The experts with something of these kinds, and what share of their energy it is."""
  found = []
  for expert in changed:
    shares = {kind: expert.shares[kind] for kind in kinds if expert.shares[kind] > 0}
    if shares:
      found.append(f"{expert.name} ({' and '.join(shares)}, {share_text(sum(shares.values()))} of its energy)")
  return found


def _rounding(changed: list[InspectedExpert], inspection: Inspection) -> Iterator[str]:
  """Full models in a coarser dtype than the base: rounding it would make a task vector of its own."""
  ours = float(jnp.finfo(inspection.base.dtype).eps)
  for expert in changed:
    eps = 0.0 if expert.is_adapter else float(jnp.finfo(expert.dtype).eps)
    if eps > ours:
      # Even errors within a step have the root mean square eps / sqrt(12) of the power of two below a weight of 1.5.
      yield (
        f"{expert.name} is stored in {expert.dtype}, its base in {inspection.base.dtype}: rounding alone changes "
        f"nearly every weight, by about {eps / 12**0.5 / 1.5:.2%} of the base's norm (an estimate), and its whole task "
        f"vector is {expert.norm / inspection.base_norm:.2%} of it."
      )


def _declared(inspection: Inspection) -> Iterator[str]:
  """Adapters that name a base of another name: of the same shape they fit, whatever they were trained on."""
  ours = inspection.base.folder.resolve().name
  for expert in inspection.experts:
    if expert.declared_base and expert.declared_base.rstrip("/").rsplit("/", 1)[-1] != ours:
      yield (
        f"{expert.name} says that its base is {expert.declared_base}; its shapes fit {ours}. Whether that is the same "
        "model cannot be measured."
      )


def share_text(share: float) -> str:
  """A share in percent; one that is not zero is not shown as zero."""
  if share < 0.0005:
    return "<0.1%" if share > 0 else "0"
  return f"{share:.1%}"


def _rank_text(ranks: tuple[int, ...]) -> str:
  return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _listed(names: list[str], between: str = ", ", last: str = " and ") -> str:
  """Names in a row; the many are cut short."""
  shown = names[:6] + ([f"{len(names) - 6} more"] if names[6:] else [])
  return last.join([between.join(shown[:-1]), shown[-1]] if shown[1:] else shown)
