"""An inspection on the terminal: tables, curves of one line, and what it means."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from rich import box
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from cqd_jax.inspect.advice import MOST, NEARLY_ALL, advice, relation, share_text
from cqd_jax.inspect.measure import KINDS, InspectedExpert, Inspection
from cqd_jax.report.energy_figure import doublings

BLOCKS, LETTERS = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
"""Heights from 0 to 1, for a terminal that has blocks and for one that has only letters."""


def show(inspection: Inspection, console: Console) -> None:
  """Prints all of it."""
  base = inspection.base
  console.print(
    f"base {base.folder}: {inspection.num_parameters:,} weights in {base.config.num_layers} layers, {base.dtype}, "
    f"{decimal(base.num_bytes)}, norm {inspection.base_norm:.4g}",
    highlight=False,
    markup=False,
  )
  for part in _parts(inspection, ascii_only=console.options.ascii_only):
    console.print()
    console.print(part, highlight=False)


def curve(energy: Float[np.ndarray, " R"], *, ascii_only: bool = False) -> str:
  """Energy by rank as a line of characters, from rank 1 to R: two a doubling, each as high as the share held."""
  heights = LETTERS if ascii_only else BLOCKS
  ranks = 2 ** np.linspace(0, math.log2(len(energy)), 2 * len(doublings(len(energy))) - 1)
  shares = energy[ranks.round().astype(int) - 1]
  return "".join(heights[math.ceil(share * (len(heights) - 1) - 1e-6)] for share in shares)


def _parts(inspection: Inspection, *, ascii_only: bool) -> Iterator[RenderableType]:
  yield _experts(inspection)
  yield _task_vectors(inspection)
  if any(expert.energy[-1] > 0 for expert in inspection.experts):
    yield _energy(inspection, ascii_only=ascii_only)
  if sum(expert.norm > 0 for expert in inspection.experts) > 1:
    yield _pairs(inspection)
  if sentences := advice(inspection):
    lines = Table.grid(padding=(0, 1))
    for sentence in sentences:
      lines.add_row("-", Text(sentence))
    whole = Table.grid()
    whole.add_row(Text("What that means for merging", style="bold"))
    whole.add_row(lines)
    yield whole


def _experts(inspection: Inspection) -> Table:
  table = _table("Experts", ["expert", "kind", "rank", "dtype"], ["on disk", "weights changed", "of all"])
  for expert in inspection.experts:
    ranks = " to ".join(str(rank) for rank in sorted({*expert.ranks[:1], *expert.ranks[-1:]}))
    share = share_text(expert.num_changed / inspection.num_parameters)
    size = decimal(expert.num_bytes)
    _row(table, expert.name, expert.kind, ranks, expert.dtype, size, f"{expert.num_changed:,}", share)
  for name in inspection.misfits:
    _row(table, name, "does not fit")
  return table


def _task_vectors(inspection: Inspection) -> Table:
  kinds = [kind for kind in KINDS if any(expert.shares[kind] > 0 for expert in inspection.experts)]
  title = "Task vectors: norm, and the share of its square (the energy) by kind of module"
  table = _table(title, ["expert"], ["norm", "of base's", *kinds])
  for expert in inspection.experts:
    relative = share_text(expert.norm / inspection.base_norm) if inspection.base_norm else ""
    shares = [share_text(expert.shares[kind]) if expert.norm else "" for kind in kinds]
    _row(table, expert.name, f"{expert.norm:.4g}", relative, *shares)
  return table


def _energy(inspection: Inspection, *, ascii_only: bool) -> Table:
  ranks = doublings(inspection.max_rank)
  title = "Share of the energy in matrices that approximations of each rank hold"
  table = _table(
    title, ["expert", f"1 to {inspection.max_rank}"], [*map(str, ranks), f"{MOST:.0%} at", f"{NEARLY_ALL:.0%} at"]
  )
  for expert in inspection.experts:
    if not expert.energy[-1] > 0:
      _row(table, expert.name)
      continue
    shares = [f"{expert.energy[rank - 1]:.0%}" for rank in ranks]
    needed = [_needed(expert, share) for share in (MOST, NEARLY_ALL)]
    _row(table, expert.name, curve(expert.energy, ascii_only=ascii_only), *shares, *needed)
  table.caption = f"All {inspection.num_matrices} matrices together, layers counted one by one."
  if any(expert.sampled for expert in inspection.experts):
    table.caption += " Large matrices of full models are sampled: their shares are lower bounds, close where they rise."
  return table


def _needed(expert: InspectedExpert, share: float) -> str:
  rank = expert.rank_of(share)
  return f">{len(expert.energy)}" if rank is None else str(rank)


def _pairs(inspection: Inspection) -> Table:
  table = _table("Pairs", ["expert", "expert", "directions"], ["cosine", "s", "matrices"])
  changed = [k for k, expert in enumerate(inspection.experts) if expert.norm > 0]
  for first, second in itertools.combinations(changed, 2):
    cosine, similarity = (float(own[first, second]) for own in (inspection.cosines, inspection.similarities))
    shared = int(inspection.num_shared[first, second])
    names = [inspection.experts[k].name for k in (first, second)]
    _row(table, *names, relation(cosine), f"{cosine:.3f}", f"{similarity:.3f}" if shared else "", str(shared))
  some = f"{inspection.max_rank} largest " if any(expert.sampled for expert in inspection.experts) else ""
  table.caption = (
    "cosine: of the whole task vectors, exact. s: CycleQD's similarity, the mean over the matrices that both change of "
    f"the cosine of their {some}singular values; it compares how energy is spread over directions, not the directions."
  )
  return table


def _table(title: str, left: list[str], right: list[str]) -> Table:
  table = Table(
    title=title,
    title_justify="left",
    caption_justify="left",
    box=box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    collapse_padding=True,
  )
  for name in left:
    table.add_column(name, overflow="fold")
  for name in right:
    table.add_column(name, justify="right")
  return table


def _row(table: Table, *cells: str) -> None:
  table.add_row(*(Text(cell) for cell in cells))  # a folder's name is no markup
