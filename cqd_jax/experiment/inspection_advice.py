"""What an inspection means for merging, in sentences; what is a rule of thumb and not measured is called one."""

from collections.abc import Iterator

from cqd_jax.experiment.inspection_measure import Inspection, InspectedExpert

ALIKE, ORTHOGONAL = 0.95, 0.1
"""Cosines: above the one two experts are nearly the same, within the other they are nearly orthogonal."""

DOMINATES = 5.0
"""From this ratio of norms on one expert dominates a merge with equal weights."""

MOST, NEARLY_ALL = 0.9, 0.99
"""Shares of the energy for which a rank is named."""


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
    *_declared(inspection),
  ]


def relation(cosine: float) -> str:
  """What a cosine of two task vectors is called; "" for NaN."""
  if cosine > ALIKE:
    return "nearly the same"
  if cosine > ORTHOGONAL:
    return "overlapping"
  if cosine >= -ORTHOGONAL:
    return "nearly orthogonal"
  return "opposed" if cosine < -ORTHOGONAL else ""


def _equal_to_base(inspection: Inspection) -> Iterator[str]:
  if same := [expert.name for expert in inspection.experts if expert.norm == 0]:
    is_, it = ("is", "it") if len(same) == 1 else ("are", "them")
    yield (
      f"{_listed(same)} {is_} equal to the base: no weight differs. In a merge {it} would only shrink what the others "
      "have learnt; leave out."
    )


MEANINGS = {
  "nearly the same": (
    f"one of them adds little to the other (rule of thumb: above {ALIKE}). Was one folder given twice, or is one a "
    "later checkpoint of the other?"
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


def _pairs(inspection: Inspection) -> Iterator[str]:
  """One sentence for each relation that there is."""
  names = [expert.name for expert in inspection.experts]
  found: dict[str, list[tuple[str, float]]] = {kind: [] for kind in MEANINGS}
  for second in range(len(names)):
    for first in range(second):
      cosine = float(inspection.cosines[first, second])
      if kind := relation(cosine):
        found[kind].append((f"{names[first]} and {names[second]}", cosine))
  for kind, pairs in found.items():
    if pairs:
      low, high = min(cosine for _, cosine in pairs), max(cosine for _, cosine in pairs)
      between = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
      yield f"{_listed([pair for pair, _ in pairs], '; ')}: {kind} (cosine {between}): {MEANINGS[kind]}"


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
  full = [expert for expert in changed if not expert.ranks and any(expert.energy > 0)]
  reached = {expert.name: rank for expert in full if (rank := expert.rank_of(MOST)) is not None}
  if reached:
    rank = max(reached.values())
    kept = [f"{expert.name} {expert.energy[rank - 1]:.1%}" for expert in full if expert.name in reached]
    most = [expert.rank_of(NEARLY_ALL) for expert in full if expert.name in reached]
    more = f"more than {max_rank}" if None in most else str(max(each for each in most if each is not None))
    yield (
      f"Rank {rank} keeps at least {MOST:.0%} of the energy in matrices ({_listed(kept)}), and {NEARLY_ALL:.0%} needs "
      f"{more}: --evolution.rank {rank} is a start. That {MOST:.0%} of the energy is enough is a rule of thumb; what "
      "it costs in skill only scores tell."
    )
  if spread := [f"{expert.name} {expert.energy[-1]:.1%}" for expert in full if expert.name not in reached]:
    yield (
      f"Not of low rank: of the energy in matrices rank {max_rank} keeps {_listed(spread)}. Core space of that rank "
      "loses the rest: give a larger --evolution.rank, or evolve all weights (--evolution.genotype dense)."
    )


def _vectors(changed: list[InspectedExpert]) -> Iterator[str]:
  own = []
  for expert in changed:
    shares = {kind: expert.shares[kind] for kind in ("norms", "biases") if expert.shares[kind] > 0}
    if shares:
      kinds = " and ".join(shares)
      own.append(f"{expert.name} ({kinds}, {share_text(sum(shares.values()))} of its energy)")
  if own:
    yield (
      f"Changed vectors: {_listed(own)}. An adapter exported from a merge with them holds them beside its factors, and "
      "vLLM serves no such adapter: leave them out of the adapter, or export a full model."
    )


def _tied(changed: list[InspectedExpert], inspection: Inspection) -> Iterator[str]:
  own = [f"{expert.name} ({share_text(expert.shares['embedding'])} of its energy)" for expert in changed]
  own = [text for text, expert in zip(own, changed, strict=True) if expert.shares["embedding"] > 0]
  if own and inspection.base.config.tie_embeddings:
    yield (
      f"Changed embedding: {_listed(own)}. It is the base's head as well (tie_word_embeddings), so that a merge weight "
      "of it acts on how tokens are read and on how they are chosen."
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
  if 0 < share < 0.001:
    return "<0.1%"
  return f"{share:.1%}"


def _rank_text(ranks: tuple[int, ...]) -> str:
  return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _listed(names: list[str], between: str = ", ") -> str:
  """Names in a row; the many are cut short."""
  return between.join(names[:6]) + (f"{between}and {len(names) - 6} more" if names[6:] else "")
