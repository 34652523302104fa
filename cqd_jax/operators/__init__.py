"""Operators on task vectors: pure functions of ONE individual; `jax.vmap` gives the population.

An individual is a task vector, the difference to the base model. So the base appears only where a task vector is made
and where it is applied.
"""

from cqd_jax.low_rank import MatrixSVD
from cqd_jax.operators.aggregation import aggregate, task_arithmetic, uniform_average
from cqd_jax.operators.crossover import linear_merge, merge_weights
from cqd_jax.operators.mutation import (
  expert_svd_mutation,
  factorize,
  gaussian_mutation,
  svd_mutation,
)
from cqd_jax.operators.task_vectors import apply_task_vector, task_vector

__all__ = [
  "MatrixSVD",
  "aggregate",
  "apply_task_vector",
  "expert_svd_mutation",
  "factorize",
  "gaussian_mutation",
  "linear_merge",
  "merge_weights",
  "svd_mutation",
  "task_arithmetic",
  "task_vector",
  "uniform_average",
]
