"""What an individual is stored as: pytrees that materialise to a task vector."""

from cqd_jax.genotypes.coefficients import Groups, apply_coefficients, group_leaves

__all__ = ["Groups", "apply_coefficients", "group_leaves"]
