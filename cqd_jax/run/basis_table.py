"""How well a core space holds the experts, in words."""

from collections.abc import Sequence

from cqd_jax.genotypes import CoreBasis
from cqd_jax.store.markdown import markdown_table


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
  return line, markdown_table(
    ["matrix (of a stack: its worst layer)", "expert", "rank", "energy", "relative error"], rows
  )
