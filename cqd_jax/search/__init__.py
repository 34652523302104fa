"""The search: emitters, the CycleQD loop, and adapters to QDax."""

from cqd_jax.search.cycleqd import CycleQD, ScoringFn
from cqd_jax.search.emitters import CycleQDEmitter, CycleQDState
from cqd_jax.search.qdax_adapters import PerArchiveEmitter, as_mutation_fn, as_variation_fn

__all__ = [
  "CycleQD",
  "CycleQDEmitter",
  "CycleQDState",
  "PerArchiveEmitter",
  "ScoringFn",
  "as_mutation_fn",
  "as_variation_fn",
]
