"""The archives: cells, repertoire, selectors, metrics."""

from cqd_jax.archive.cells import Cells, Centroids, Grid
from cqd_jax.archive.metrics import coverage, cycling_metrics, holders, max_fitness, qd_score
from cqd_jax.archive.repertoire import CyclingRepertoire, Individual, Lineage
from cqd_jax.archive.selectors import (
  RuleSelector,
  elite_sampling,
  reference_elite_sampling,
  select_pairs,
  uniform_sampling,
)

__all__ = [
  "Cells",
  "Centroids",
  "CyclingRepertoire",
  "Grid",
  "Individual",
  "Lineage",
  "RuleSelector",
  "coverage",
  "cycling_metrics",
  "elite_sampling",
  "holders",
  "max_fitness",
  "qd_score",
  "reference_elite_sampling",
  "select_pairs",
  "uniform_sampling",
]
