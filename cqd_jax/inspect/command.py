"""`cqd inspect`: a look at experts before they are merged."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cqd_jax.hub.experts import Expert, open_expert
from cqd_jax.hub.load import ModelFolder, open_pretrained
from cqd_jax.inspect.measure import InspectedExpert, Inspection, measure, num_bytes
from cqd_jax.inspect.view import show
from cqd_jax.report.archive_plot import save_figure
from cqd_jax.report.energy_figure import energy_figure
from cqd_jax.terminal.progress import megabytes

__all__ = ["InspectedExpert", "Inspection", "inspect"]

FORMATS = (".png", ".svg", ".pdf")


def inspect(
  base: Path, experts: Sequence[Path], console: Console, *, figure: Path | None = None, max_rank: int = 64
) -> Inspection:
  """Measures experts against their base, and prints the figures and what they mean for merging.

  Experts that do not fit the base are named with the reason, and the others are inspected. Large matrices of full
  models are sampled, those of adapters never written out; no model is ever whole in memory.

  Args:
    base: folder of the base model.
    experts: folders of experts, whole models or LoRA adapters; one is enough.
    console: where progress and figures go.
    figure: a file for the figure of energy by rank: png, svg or pdf, by its ending; None: not drawn.
    max_rank: up to which energy is measured, at least 1.

  Returns:
    What was measured.

  Raises:
    ValueError: naming the argument: no expert, one that is given twice, a base that is none, no expert that fits, a
      `max_rank` below 1, a `figure` of another format.
  """
  folders = _named(experts)
  if max_rank < 1:
    raise ValueError(f"max_rank: expected at least 1, got {max_rank}")
  if figure is not None and figure.suffix.lower() not in FORMATS:
    raise ValueError(f"figure: expected a file that ends in {', '.join(FORMATS)}, got {figure}")
  opened, misfits = _opened(folders, open_pretrained(base), console)
  inspection = _measured(opened, misfits, max_rank, console)
  show(inspection, console)
  if figure is not None:
    _draw(inspection, figure, console)
  return inspection


def _named(folders: Sequence[Path]) -> dict[str, Path]:
  """The experts' folders by a name for each: that of the folder, or its path where two have the same name."""
  if not folders:
    raise ValueError("experts: expected at least one folder of an expert, got none")
  by_place: dict[Path, Path] = {}
  for folder in folders:
    if by_place.setdefault(folder.resolve(), folder) is not folder:
      raise ValueError(f"experts: {folder} is given twice")
  names = [folder.resolve().name for folder in folders]
  return {str(folder) if names.count(name) > 1 else name: folder for name, folder in zip(names, folders, strict=True)}


def _opened(
  folders: Mapping[str, Path], base: ModelFolder, console: Console
) -> tuple[dict[str, Expert], dict[str, str]]:
  """The experts that fit, and why the others do not."""
  opened, misfits = {}, {}
  for name, folder in folders.items():
    try:
      opened[name] = open_expert(folder, base)
    except (ValueError, OSError) as error:
      misfits[name] = str(error)
  _tell(misfits, fitting=len(opened), console=console)
  return opened, misfits


def _measured(opened: Mapping[str, Expert], misfits: Mapping[str, str], max_rank: int, console: Console) -> Inspection:
  base = next(iter(opened.values())).base
  with megabytes(console, "measuring (MB)", num_bytes(base, opened.values())) as advance:
    inspection = measure(base, opened, max_rank=max_rank, on_part=advance)
  _tell(inspection.misfits, fitting=len(inspection.experts), console=console)
  return dataclasses.replace(inspection, misfits={**misfits, **inspection.misfits})


def _tell(misfits: Mapping[str, str], *, fitting: int, console: Console) -> None:
  """Says why experts do not fit; raises if there is none that does."""
  if not fitting:
    reasons = "; ".join(misfits.values())
    raise ValueError(reasons if len(misfits) == 1 else f"experts: none fits the base: {reasons}")
  for name, reason in misfits.items():
    console.print(f"{name} does not fit and is left out: {reason}", highlight=False, markup=False)


def _draw(inspection: Inspection, file: Path, console: Console) -> None:
  curves = {expert.name: expert.energy for expert in inspection.experts if expert.energy[-1] > 0}
  if not curves:
    console.print("no figure of energy by rank, since no expert changes a matrix", highlight=False)
    return
  save_figure(energy_figure(curves), file)
  console.print(f"figure of energy by rank: {file}", highlight=False, markup=False)
