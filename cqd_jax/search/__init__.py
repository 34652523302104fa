"""The search: algorithms, emitters, the CycleQD loop, and adapters to QDax."""

from cqd_jax.search.algorithm import Algorithm, Info, Population, SearchContext
from cqd_jax.search.archive_search import ArchiveSearch
from cqd_jax.search.cycleqd import CycleQD, ScoringFn
from cqd_jax.search.emitters import CycleQDEmitter, CycleQDState
from cqd_jax.search.qdax_adapters import PerArchiveEmitter, as_mutation_fn, as_variation_fn

__all__ = [
  "Algorithm",
  "ArchiveSearch",
  "CycleQD",
  "CycleQDEmitter",
  "CycleQDState",
  "Info",
  "PerArchiveEmitter",
  "Population",
  "ScoringFn",
  "SearchContext",
  "as_mutation_fn",
  "as_variation_fn",
]
