"""Older names of `cqd_jax.hub`, which keep working."""
