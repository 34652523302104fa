"""Operators on task vectors: pure functions of ONE individual; `jax.vmap` gives the population.

An individual is a task vector, the difference to the base model. So the base appears only where a task vector is made
and where it is applied.
"""

from cqd_jax.low_rank import MatrixSVD
from cqd_jax.operators.aggregation import aggregate, passthrough, task_arithmetic, uniform_average
from cqd_jax.operators.consensus import magmax, ram, ramplus_tl, sce, sign_consensus, ties
from cqd_jax.operators.crossover import (
  Child,
  dare_crossover,
  line_crossover,
  linear_crossover,
  slerp_crossover,
  split_slerp_crossover,
  ties_crossover,
)
from cqd_jax.operators.fitted import fisher, model_stock, model_stock_rows, regmean, wudi
from cqd_jax.operators.frames import FRAMES, Frame, check_frame, frame_of, needs_frame
from cqd_jax.operators.linear import linear_merge, merge_weights
from cqd_jax.operators.masks import UnifiedTaskVector, consensus_merge, emr, tall_masks
from cqd_jax.operators.mutation import (
  expert_svd_mutation,
  factorize,
  gaussian_mutation,
  svd_mutation,
)
from cqd_jax.operators.sparse_merges import (
  breadcrumbs,
  breadcrumbs_ties,
  dare_linear,
  dare_ties,
  della,
  della_linear,
)
from cqd_jax.operators.sparsify import dare, magprune, trim, trim_tails
from cqd_jax.operators.spectral import iso_c, iso_cts, knots, knots_dare_ties, knots_ties, tsv
from cqd_jax.operators.spherical import karcher, multislerp, nuslerp, nuslerp_rows, slerp
from cqd_jax.operators.task_vectors import apply_task_vector, task_vector
from cqd_jax.operators.toward import arcee_fusion, nearswap

# Behind all modules: it takes the name of one of them.
from cqd_jax.operators.aggregation import linear  # isort: skip

__all__ = [
  "FRAMES",
  "Child",
  "Frame",
  "MatrixSVD",
  "UnifiedTaskVector",
  "aggregate",
  "apply_task_vector",
  "arcee_fusion",
  "breadcrumbs",
  "breadcrumbs_ties",
  "check_frame",
  "consensus_merge",
  "dare",
  "dare_crossover",
  "dare_linear",
  "dare_ties",
  "della",
  "della_linear",
  "emr",
  "expert_svd_mutation",
  "factorize",
  "fisher",
  "frame_of",
  "gaussian_mutation",
  "iso_c",
  "iso_cts",
  "karcher",
  "knots",
  "knots_dare_ties",
  "knots_ties",
  "line_crossover",
  "linear",
  "linear_crossover",
  "linear_merge",
  "magmax",
  "magprune",
  "merge_weights",
  "model_stock",
  "model_stock_rows",
  "multislerp",
  "nearswap",
  "needs_frame",
  "nuslerp",
  "nuslerp_rows",
  "passthrough",
  "ram",
  "ramplus_tl",
  "regmean",
  "sce",
  "sign_consensus",
  "slerp",
  "slerp_crossover",
  "split_slerp_crossover",
  "svd_mutation",
  "tall_masks",
  "task_arithmetic",
  "task_vector",
  "ties",
  "ties_crossover",
  "trim",
  "trim_tails",
  "tsv",
  "uniform_average",
  "wudi",
]
