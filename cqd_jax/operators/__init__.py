"""Operators on task vectors: pure functions of ONE individual; `jax.vmap` gives the population.

An individual is a task vector, the difference to the base model. So the base appears only where a task vector is made
and where it is applied.
"""

from cqd_jax.low_rank import MatrixSVD
from cqd_jax.operators.aggregation import aggregate, task_arithmetic, uniform_average
from cqd_jax.operators.consensus import sign_consensus, ties
from cqd_jax.operators.crossover import (
  Child,
  dare_crossover,
  line_crossover,
  linear_crossover,
  slerp_crossover,
  split_slerp_crossover,
  ties_crossover,
)
from cqd_jax.operators.frames import FRAMES, Frame, check_frame, frame_of, needs_frame
from cqd_jax.operators.linear import linear_merge, merge_weights
from cqd_jax.operators.mutation import (
  expert_svd_mutation,
  factorize,
  gaussian_mutation,
  svd_mutation,
)
from cqd_jax.operators.sparsify import dare, trim
from cqd_jax.operators.spherical import slerp
from cqd_jax.operators.task_vectors import apply_task_vector, task_vector

__all__ = [
  "FRAMES",
  "Child",
  "Frame",
  "MatrixSVD",
  "aggregate",
  "apply_task_vector",
  "check_frame",
  "dare",
  "dare_crossover",
  "expert_svd_mutation",
  "factorize",
  "frame_of",
  "gaussian_mutation",
  "line_crossover",
  "linear_crossover",
  "linear_merge",
  "merge_weights",
  "needs_frame",
  "sign_consensus",
  "slerp",
  "slerp_crossover",
  "split_slerp_crossover",
  "svd_mutation",
  "task_arithmetic",
  "task_vector",
  "ties",
  "ties_crossover",
  "trim",
  "uniform_average",
]
