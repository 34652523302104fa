"""cqd_jax evolves populations of neural networks by model merging, as JAX array programs.

The names that a user needs are here, and are loaded when they are first used: `from cqd_jax import CycleQD, Grid`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
  "archive": ("Centroids", "CyclingRepertoire", "Grid"),
  "genotypes": ("CoreBasis", "apply_coefficients", "group_leaves"),
  "hub": ("load_pretrained", "save_pretrained"),
  "models": ("DecoderConfig", "forward"),
  "operators": (
    "Child",
    "aggregate",
    "apply_task_vector",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus_merge",
    "dare",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "emr",
    "expert_svd_mutation",
    "factorize",
    "fisher",
    "gaussian_mutation",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots_dare_ties",
    "knots_ties",
    "linear",
    "linear_merge",
    "magmax",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "regmean",
    "sce",
    "slerp",
    "svd_mutation",
    "task_arithmetic",
    "task_vector",
    "ties",
    "tsv",
    "uniform_average",
    "wudi",
  ),
  "search": ("Algorithm", "CycleQD", "CycleQDEmitter", "PerArchiveEmitter"),
  "tasks": ("Episode", "Problem", "Scored", "TextProblem", "TracedProblem"),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
  if name not in _WHERE:
    raise AttributeError(f"module 'cqd_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"cqd_jax.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_WHERE})
