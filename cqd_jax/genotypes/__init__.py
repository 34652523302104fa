"""What an individual is stored as: pytrees that materialize to a task vector."""

from cqd_jax.genotypes.coefficients import Groups, apply_coefficients, group_leaves
from cqd_jax.genotypes.core import CoreBasis, Fit

__all__ = ["CoreBasis", "Fit", "Groups", "apply_coefficients", "group_leaves"]
